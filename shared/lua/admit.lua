-- admit(KEYS = per request: the mark of its idempotency key, the item's door record, the count of its waiting units,
--              then the bucket of each limit;
--       ARGV = life of a mark in ms, life of a count in ms, how many limits there are, per limit its name, the
--              microseconds after which a token comes back and its burst, then per request: quantity, and 1 if it has
--              taken its tokens before, else 0)
--   -> per request, in one flat list: its verdict, the ms to wait (0 unless a limit or a full queue refuses it), and per
--      limit the tokens that are left and the ms until none is missing. Verdicts:
--   'known'        a purchase with this idempotency key exists, or is under way: nothing is refused
--   'open'         may be accepted; its units wait from now on
--   a limit's name its bucket has no token left
--   'unknown-item' there is no door record: read the item from Postgres
--   'not-on-sale'  outside the item's opening hours
--   'sold-out'     more than can still be within reach
--   'not-counted'  nobody knows how many units wait: count them in Postgres
--   'queue-full'   with the units that wait already, more than can still be within reach
-- Tokens come first: a request whose key is new here takes one of each limit, whatever becomes of it, or none if a limit
-- refuses it. One that knocks again, once what was missing is there, takes no second token.
--
-- Whoever is let in is marked here and now, before anything is committed: a retry that comes while the first try is
-- still being committed must not be refused. A mark without a purchase does no harm: accepting is always safe. The mark
-- is either
--   '<requests> <units> <count>'  so many requests stand on these units, which were added to this count; the one that
--                                 was recorded stands on them for good, every other gives back (give_back.lua)
--   'known'                       a purchase exists, and none of its units were counted for this mark
-- Refusals are provisional: a key that is not marked here may still be known to Postgres.
--
-- A bucket is one number (GCRA): the moment, in microseconds, at which it will be full. Each token taken moves it by the
-- time after which one comes back; a bucket is empty when it would lie further ahead than its burst takes to come back.
local time = redis.call('TIME')
local micros = time[1] * 1000000 + time[2]
local stamp = math.floor(micros / 1000)

-- Milliseconds after which a full queue may have a place. Stock that is there is given out in the next decisions, and
-- whoever waits for it leaves, or it is sold out: a second is about what the lanes need.
local SOME_AVAILABLE = 1000
-- Nothing is there, and unpaid holds fall back one by one, as payments are declined or time runs out: that takes seconds
-- at least. A crowd that asked every second would ask five times for nothing.
local NONE_AVAILABLE = 5000

local limits = {}
for n = 1, tonumber(ARGV[3]) do
  limits[n] = {name = ARGV[3 * n + 1], interval = tonumber(ARGV[3 * n + 2]), burst = tonumber(ARGV[3 * n + 3])}
end
local per_request = 3 + #limits
local before_requests = 3 + 3 * #limits

-- Many requests of one call are about the same item and come from the same client: each key is read and written once.
local items, buckets = {}, {}

local function item_of(door, count)
  if not items[door] then
    local record = redis.call('HMGET', door, 'within_reach', 'available', 'opens', 'closes')
    items[door] = {
      within_reach = tonumber(record[1]), opens = tonumber(record[3]), closes = tonumber(record[4]),
      -- A record of an older release does not say: as if something were available.
      available = tonumber(record[2]) or 1,
      waiting = tonumber(redis.call('GET', count)), count = count,
    }
  end
  return items[door]
end

local function bucket_of(key, limit)
  if not buckets[key] then
    local full_at = tonumber(redis.call('GET', key)) or micros
    -- Never further ahead than an empty bucket: a clock that was set back would otherwise close it for as long.
    buckets[key] = {full_at = math.min(math.max(full_at, micros), micros + limit.burst * limit.interval)}
  end
  return buckets[key]
end

-- One microsecond of tolerance, as moments are kept without fractions.
local function tokens(bucket, limit)
  return math.floor((micros + limit.burst * limit.interval - bucket.full_at + 1) / limit.interval)
end

-- Takes a token of each limit, or of none. at: where the request's keys begin. -> the name of the first limit that has
-- no token, or nil, and the ms until all have one.
local function take(at)
  local refused, wait = nil, 0
  for n, limit in ipairs(limits) do
    local bucket = bucket_of(KEYS[at + 3 + n], limit)
    if tokens(bucket, limit) < 1 then
      refused = refused or limit.name
      local missing = bucket.full_at + limit.interval - (micros + limit.burst * limit.interval)
      wait = math.max(wait, math.ceil(missing / 1000))
    end
  end
  if not refused then
    for n, limit in ipairs(limits) do
      local bucket = bucket_of(KEYS[at + 3 + n], limit)
      bucket.full_at = bucket.full_at + limit.interval
      bucket.taken = true
    end
  end
  return refused, wait
end

local function judge(item, quantity)
  if not item.within_reach then
    return 'unknown-item', 0
  elseif (item.opens and stamp < item.opens) or (item.closes and stamp >= item.closes) then
    return 'not-on-sale', 0
  elseif quantity > item.within_reach then
    return 'sold-out', 0
  elseif not item.waiting then
    return 'not-counted', 0
  elseif item.waiting + quantity > item.within_reach then
    return 'queue-full', item.available > 0 and SOME_AVAILABLE or NONE_AVAILABLE
  end
  return 'open', 0
end

local replies = {}
for i = 1, (#ARGV - before_requests) / 2 do
  local at = per_request * (i - 1)
  local mark = KEYS[at + 1]
  local quantity, has_taken = tonumber(ARGV[before_requests + 2 * i - 1]), ARGV[before_requests + 2 * i] == '1'
  local verdict, wait = 'known', 0
  local marked = redis.call('GET', mark)
  if marked then
    local requests, units = string.match(marked, '^(%d+)( .+)$')
    if requests then
      redis.call('SET', mark, (requests + 1) .. units, 'KEEPTTL')
    end
  else
    local refused = nil
    if not has_taken then
      refused, wait = take(at)
    end
    if refused then
      verdict = refused
    else
      local item = item_of(KEYS[at + 2], KEYS[at + 3])
      verdict, wait = judge(item, quantity)
      if verdict == 'open' then
        item.waiting = item.waiting + quantity
        item.let_in = true
        redis.call('SET', mark, '1 ' .. quantity .. ' ' .. item.count, 'PX', ARGV[1])
      end
    end
  end
  replies[#replies + 1] = verdict
  replies[#replies + 1] = wait
  for n, limit in ipairs(limits) do
    local bucket = bucket_of(KEYS[at + 3 + n], limit)
    replies[#replies + 1] = math.max(0, tokens(bucket, limit))
    replies[#replies + 1] = math.ceil((bucket.full_at - micros) / 1000)
  end
end

for _, item in pairs(items) do
  if item.let_in then
    redis.call('SET', item.count, string.format('%.0f', item.waiting), 'PX', ARGV[2])
  end
end
for key, bucket in pairs(buckets) do
  if bucket.taken then
    redis.call('SET', key, string.format('%.0f', bucket.full_at), 'PX', math.ceil((bucket.full_at - micros) / 1000))
  end
end
return replies
