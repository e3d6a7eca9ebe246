-- lock_acquire(KEYS = locks; ARGV = ttl in ms, then one owner per lock) -> one reply per lock
--   1        the lock is the owner's: it was free, or the owner had it already (the reply to a first try can be lost)
--   a text   somebody else has it: that owner
-- A lock the owner already had gets a whole new life: its owner has just begun again.
local replies = {}
for i, lock in ipairs(KEYS) do
  local owner = ARGV[i + 1]
  if redis.call('SET', lock, owner, 'NX', 'PX', ARGV[1]) then
    replies[i] = 1
  else
    local holder = redis.call('GET', lock)
    if holder == owner then
      redis.call('PEXPIRE', lock, ARGV[1])
      replies[i] = 1
    else
      replies[i] = holder
    end
  end
end
return replies
