-- lock_acquire(KEYS = locks; ARGV = ttl in ms, then one owner per lock) -> one reply per lock
--   1  the lock is the owner's: it was free, or the owner had it already (the reply to a first try can be lost)
--   0  somebody else has it
-- A lock the owner already had gets a whole new life: its owner has just begun again.
local replies = {}
for i, lock in ipairs(KEYS) do
  local owner = ARGV[i + 1]
  if redis.call('SET', lock, owner, 'NX', 'PX', ARGV[1]) then
    replies[i] = 1
  elseif redis.call('GET', lock) == owner then
    redis.call('PEXPIRE', lock, ARGV[1])
    replies[i] = 1
  else
    replies[i] = 0
  end
end
return replies
