-- give_back(KEYS = per request: the mark of its idempotency key;
--           ARGV = life of a count in ms, then per request: 1 to forget its key or 0) -> how many units were given back
-- For requests that `admit` let in (open or known) and that are surely not recorded by their own commit. Each stands on
-- the units of its mark no longer; with the last of them the units wait no longer. Which units these are, and the count
-- they were added to, is read from the mark: a request that came later with the same key may ask for something else.
-- One that was recorded never comes here, so its units stay. A mark that is gone, or 'known', has no units to give.
local given = 0
for i = 1, #KEYS do
  local requests, units, count = string.match(redis.call('GET', KEYS[i]) or '', '^(%d+) (%d+) (.+)$')
  if requests and tonumber(requests) > 1 then
    redis.call('SET', KEYS[i], (requests - 1) .. ' ' .. units .. ' ' .. count, 'KEEPTTL')
  elseif requests then
    local waiting = tonumber(redis.call('GET', count))
    if waiting then
      redis.call('SET', count, string.format('%.0f', math.max(0, waiting - units)), 'PX', ARGV[1])
    end
    if ARGV[i + 1] == '1' then
      redis.call('DEL', KEYS[i])
    else
      redis.call('SET', KEYS[i], 'known', 'KEEPTTL')
    end
    given = given + units
  end
end
return given
