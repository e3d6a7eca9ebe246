-- write_doors(KEYS = items; ARGV = ttl in ms, then per item: rev, within reach, opens at, closes at) -> how many were written
--   within reach  units that a new purchase may still get: what is available, and what unpaid holds may give back
--   opens, closes ms since 1970, or '' for always
-- An older rev never overwrites a newer one; the same rev is written again and lives anew.
local written = 0
for i, key in ipairs(KEYS) do
  local at = 4 * i - 2
  local current = redis.call('HGET', key, 'rev')
  if not current or tonumber(current) <= tonumber(ARGV[at]) then
    redis.call('HSET', key, 'rev', ARGV[at], 'within_reach', ARGV[at + 1], 'opens', ARGV[at + 2], 'closes', ARGV[at + 3])
    redis.call('PEXPIRE', key, ARGV[1])
    written = written + 1
  end
end
return written
