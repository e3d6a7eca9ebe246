-- write_statuses(KEYS = purchases; ARGV = ttl in ms, then rev and JSON per purchase) -> how many were written
-- An older rev never overwrites a newer one; the same rev is written again, as it was just read from Postgres.
-- The value is `rev|written at, ms|JSON`. The time is this server's, so that readers compare it with the same clock.
local now = redis.call('TIME')
local stamp = now[1] * 1000 + math.floor(now[2] / 1000)
local written = 0
for i, key in ipairs(KEYS) do
  local rev = ARGV[2 * i]
  local current = redis.call('GET', key)
  if not current or tonumber(string.match(current, '^%d+')) <= tonumber(rev) then
    redis.call('SET', key, string.format('%s|%.0f|%s', rev, stamp, ARGV[2 * i + 1]), 'PX', ARGV[1])
    written = written + 1
  end
end
return written
