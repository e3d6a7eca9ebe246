-- write_statuses(KEYS = purchases; ARGV = ttl in ms, channel, then rev and JSON per purchase) -> how many were written
-- An older rev never overwrites a newer one; the same rev is written again, as it was just read from Postgres.
-- The value is `rev|written at, ms|JSON`. The time is this server's, so that readers compare it with the same clock.
-- One message on the channel names the purchases that are new here or have a newer rev: their ids, which are the ends
-- of the keys, separated by spaces.
local now = redis.call('TIME')
local stamp = now[1] * 1000 + math.floor(now[2] / 1000)
local written = 0
local changed = {}
for i, key in ipairs(KEYS) do
  local rev = ARGV[2 * i + 1]
  local current = redis.call('GET', key)
  local known = current and tonumber(string.match(current, '^%d+'))
  if not known or known <= tonumber(rev) then
    redis.call('SET', key, string.format('%s|%.0f|%s', rev, stamp, ARGV[2 * i + 2]), 'PX', ARGV[1])
    written = written + 1
  end
  if not known or known < tonumber(rev) then
    changed[#changed + 1] = string.match(key, '[^:]+$')
  end
end
if #changed > 0 then
  redis.call('PUBLISH', ARGV[2], table.concat(changed, ' '))
end
return written
