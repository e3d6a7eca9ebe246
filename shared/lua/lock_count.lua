-- lock_count(KEYS = totals, recent, before; ARGV = window in ms, then a field and an amount in turn) -> 0
--   totals          hash of everything ever counted, without expiry
--   recent, before  the same for the window under way and for the one before it; each lives for two windows
-- Every amount is added to totals and to recent. A recent that is older than a window becomes before, by this
-- server's clock, so that all who count share one window.
local window = tonumber(ARGV[1])
local left = redis.call('PTTL', KEYS[2])
if left >= 0 and left < window then
  redis.call('RENAME', KEYS[2], KEYS[3])
  left = -2
end
for i = 2, #ARGV, 2 do
  redis.call('HINCRBYFLOAT', KEYS[1], ARGV[i], ARGV[i + 1])
  redis.call('HINCRBYFLOAT', KEYS[2], ARGV[i], ARGV[i + 1])
end
if left < 0 then
  redis.call('PEXPIRE', KEYS[2], 2 * window)
end
return 0
