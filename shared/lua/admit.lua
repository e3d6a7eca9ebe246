-- admit(KEYS = per request: the mark of its idempotency key, the item's door record;
--       ARGV = life of a mark in ms, then the quantity per request) -> one verdict per request:
--   'known'        a purchase with this idempotency key exists: nothing is refused
--   'open'         may be accepted
--   'unknown-item' there is no door record: read the item from Postgres
--   'not-on-sale'  outside the item's opening hours
--   'sold-out'     more than can still be within reach
-- Whoever is let in is marked here and now, before anything is committed: a retry that comes while the first try is
-- still being committed must not be refused. A mark without a purchase does no harm: accepting is always safe.
-- Refusals are provisional: a key that is not marked here may still be known to Postgres.
local now = redis.call('TIME')
local stamp = now[1] * 1000 + math.floor(now[2] / 1000)
local verdicts = {}
for i = 1, #ARGV - 1 do
  local verdict = 'open'
  if redis.call('EXISTS', KEYS[2 * i - 1]) == 1 then
    verdict = 'known'
  else
    local door = redis.call('HMGET', KEYS[2 * i], 'within_reach', 'opens', 'closes')
    if not door[1] then
      verdict = 'unknown-item'
    elseif (door[2] ~= '' and stamp < tonumber(door[2])) or (door[3] ~= '' and stamp >= tonumber(door[3])) then
      verdict = 'not-on-sale'
    elseif tonumber(ARGV[i + 1]) > tonumber(door[1]) then
      verdict = 'sold-out'
    end
  end
  if verdict == 'open' then
    redis.call('SET', KEYS[2 * i - 1], 1, 'PX', ARGV[1])
  end
  verdicts[i] = verdict
end
return verdicts
