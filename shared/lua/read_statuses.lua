-- read_statuses(KEYS = purchases; ARGV = none) -> per purchase its age in ms and its JSON, or -1 and '' if unknown
local now = redis.call('TIME')
local stamp = now[1] * 1000 + math.floor(now[2] / 1000)
local replies = {}
for i, key in ipairs(KEYS) do
  local current = redis.call('GET', key)
  if current then
    local written, json = string.match(current, '^%d+|(%d+)|(.*)$')
    replies[2 * i - 1] = math.max(0, stamp - tonumber(written))
    replies[2 * i] = json
  else
    replies[2 * i - 1] = -1
    replies[2 * i] = ''
  end
end
return replies
