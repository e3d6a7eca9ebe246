-- delete_if_equal(KEYS = keys; ARGV = one value per key) -> one reply per key
--   1  the key held this value and is gone
--   0  the key is gone already or holds another value; nothing was changed
-- Releases a lock only for its owner, and takes back a call only if it is still one's own.
local replies = {}
for i, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[i] then
    replies[i] = redis.call('DEL', key)
  else
    replies[i] = 0
  end
end
return replies
