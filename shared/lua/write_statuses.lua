-- write_statuses(KEYS = purchases; ARGV = ttl in ms, channel, then rev and JSON per purchase) -> how many were written
-- An older rev never overwrites a newer one; the same rev is written again, as it was just read from Postgres.
-- The value is `rev|written at, ms|JSON`. The time is this server's, so that readers compare it with the same clock.
-- One message on the channel names the purchases that are new here or have a newer rev: their ids, which are the last
-- 32 characters of the keys, separated by spaces.
local now = redis.call('TIME')
local stamp = string.format('|%.0f|', now[1] * 1000 + math.floor(now[2] / 1000))
local ttl = ARGV[1]
local written = 0
local changed = {}
for i, key in ipairs(KEYS) do
  local rev = ARGV[2 * i + 1]
  -- One command that writes and tells what was there: to look first costs as much again, and nearly nobody is late.
  local before = redis.call('SET', key, rev .. stamp .. ARGV[2 * i + 2], 'PX', ttl, 'GET')
  local known = before and tonumber(string.match(before, '^%d+'))
  if known and known > tonumber(rev) then
    redis.call('SET', key, before, 'KEEPTTL')
  else
    written = written + 1
    if known ~= tonumber(rev) then
      changed[#changed + 1] = string.sub(key, -32)
    end
  end
end
if #changed > 0 then
  redis.call('PUBLISH', ARGV[2], table.concat(changed, ' '))
end
return written
