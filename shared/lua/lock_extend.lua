-- lock_extend(KEYS = locks; ARGV = ttl in ms, then one owner per lock) -> one reply per lock
--   1  the owner still had the lock; it now lives for ttl from now
--   0  the lock is gone or somebody else's; nothing was changed
local replies = {}
for i, lock in ipairs(KEYS) do
  if redis.call('GET', lock) == ARGV[i + 1] then
    replies[i] = redis.call('PEXPIRE', lock, ARGV[1])
  else
    replies[i] = 0
  end
end
return replies
