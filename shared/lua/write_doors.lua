-- write_doors(KEYS = per item: its door record, the count of its waiting units;
--             ARGV = life of a door record in ms, life of a count in ms, then per item: rev, within reach, available,
--                    opens at, closes at, left) -> how many door records were written
--   rev           '' if there is no door record to write
--   within reach  units that a new purchase may still get: what is available, and what unpaid holds may give back
--   available     units that nobody holds: the part of them that is there now
--   opens, closes ms since 1970, or '' for always
--   left          units that wait no longer: they were given stock or refused it, or were cancelled
-- An older rev never overwrites a newer one; the same rev is written again and lives anew. The count is lowered in the
-- same step, so that nobody is let in on units that are neither waiting nor held yet. A count that is not there stays
-- away: whoever needs it counts in Postgres. What is not exact about that is said in shared/doors.py.
local written = 0
for i = 1, #KEYS / 2 do
  local door, count = KEYS[2 * i - 1], KEYS[2 * i]
  local at = 6 * i - 3
  local rev, left = ARGV[at], tonumber(ARGV[at + 5])
  if rev ~= '' then
    local current = redis.call('HGET', door, 'rev')
    if not current or tonumber(current) <= tonumber(rev) then
      redis.call('HSET', door, 'rev', rev, 'within_reach', ARGV[at + 1], 'available', ARGV[at + 2],
        'opens', ARGV[at + 3], 'closes', ARGV[at + 4])
      redis.call('PEXPIRE', door, ARGV[1])
      written = written + 1
    end
  end
  local waiting = left > 0 and tonumber(redis.call('GET', count))
  if waiting then
    redis.call('SET', count, string.format('%.0f', math.max(0, waiting - left)), 'PX', ARGV[2])
  end
end
return written
