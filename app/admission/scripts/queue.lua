-- The order of fairness.py on shared state. Every script is: clock, this file, quota, what it does itself.
--
-- KEYS[1] is the prefix of all keys. ARGV: 1 replica, 2 epoch it believes in, 3 number of this call, 4 number of its
-- last answered call, 5 rules (msgpack), 6 payload (msgpack). A call answers msgpack: {status, opens_in_us, body}.
--
--   state              hash    epoch, seen (last call), server (its run id), since and until (grants are withheld: see
--                              `is_open`)
--   slots              hash    worker -> slots: the most that a live replica sees in it (view:WORKER: replica -> slots),
--                              of an adaptive worker at most its limit (limit:WORKER: replica -> limit; see `limit_of`)
--   held:WORKER        zset    lease id -> expiry. The set is the truth; nothing counts beside it
--   tickets            hash    ticket id -> what is known of it. An id names its replica: REPLICA.RANDOM
--   line:BAND:ROUTE    zset    tenant -> tag of its flow
--   flow:BAND:ROUTE:T  zset    ticket id -> order in the flow of tenant T
--   lines:WORKER       set     BAND:ROUTE of the lines that may use the worker
--   virtual, finish:BAND       virtual time of a band; tenant -> finish, only of those that it has not passed
--   depth              hash    how many wait, and their bytes, per tenant, band, line and in all
--   drain:ROUTE        string  mean gap between grants while somebody waits
--   drains:BAND:ROUTE  hash    tenant -> the same of its flow, for as long as it waits
--   deadlines          zset    ticket id -> deadline
--   alive, synced      zset    replica -> its last call, its last sync
--   calls, replies     hash    replica -> number of its last call, and what that was answered

local OK, RESYNC, STALE = 0, 1, 2
local GRANTED, WAITS, TENANT_FULL, BAND_FULL, QUEUE_FULL, HOPELESS = 0, 1, 2, 3, 4, 5
local MOVED, BANDS = 0, 5
local DRAIN_WINDOW, DRAIN_TRUSTED, TENANTS_KNOWN = 32, 16, 10000

local call = redis.call
local prefix = KEYS[1]
local me, epoch, number, answered = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local rules, payload = cmsgpack.unpack(ARGV[5]), cmsgpack.unpack(ARGV[6])
local order, lease_us, settle_us, replicas = unpack(rules)
local tenant_limit, band_limit, total_limit, tenant_bytes, band_bytes, total_bytes, ageing_us, us_per_token = unpack(order)
local now = now_us()

local function key(name, ...)
  return prefix .. table.concat({ name, ... }, ':')
end

local function number_of(reply)
  return tonumber(reply or 0)
end

-- What a call reads it keeps, and what it changed it writes back once, in `answer`: a field costs one command a call.

local function kept(load, store)
  local values, changed = {}, {}
  return {
    get = function(name)
      if values[name] == nil then
        values[name] = load(name)
      end
      return values[name]
    end,
    put = function(name, value)
      values[name], changed[name] = value, true
    end,
    write_back = function()
      for name in pairs(changed) do
        store(name, values[name])
      end
    end,
  }
end

local depth = kept(function(field)
  return number_of(call('HGET', key('depth'), field))
end, function(field, value)
  if value == 0 then
    call('HDEL', key('depth'), field)
  else
    call('HSET', key('depth'), field, value)
  end
end)

local virtual = kept(function(band)
  return number_of(call('HGET', key('virtual'), band))
end, function(band, value)
  call('HSET', key('virtual'), band, value)
  call('ZREMRANGEBYSCORE', key('finish', band), '-inf', value)
end)

-- route -> {time of the last grant, mean gap, grants counted}, or false
local drain = kept(function(route)
  local packed = call('GET', key('drain', route))
  return packed and cmsgpack.unpack(packed)
end, function(route, value)
  call('SET', key('drain', route), cmsgpack.pack(value), 'EX', 3600)
end)

-- What is written back when a call is answered.
local written = { depth, virtual, drain }

local function flow_drain(place)
  local packed = call('HGET', key('drains', place.band, place.route), place.tenant)
  return packed and cmsgpack.unpack(packed)
end

local function put_flow_drain(place, value)
  call('HSET', key('drains', place.band, place.route), place.tenant, cmsgpack.pack(value))
end

local function drained(known)
  local counted = math.min(known[3] + 1, DRAIN_WINDOW)
  return { now, known[2] + (now - known[1] - known[2]) / counted, counted }
end

local function nothing() end

local slots = kept(function(worker)
  return number_of(call('HGET', key('slots'), worker))
end, nothing)

local load = kept(function(worker)
  return call('ZCARD', key('held', worker))
end, nothing)

local lines = kept(function(worker)
  local names = call('SMEMBERS', key('lines', worker))
  table.sort(names)
  return names
end, nothing)

-- Who is alive, and whether grants may be made

local function replica_of(id)
  return string.match(id, '^[^.]*')
end

local function channel(replica)
  return key('grants', replica)
end

local listening = { [me] = true }

-- A grant that nobody hears would hold a slot until it expires. The tickets of a replica that does not listen are
-- dropped; if it lives, it brings them again when it does.
local function is_listening(replica)
  if listening[replica] == nil then
    listening[replica] = call('PUBSUB', 'NUMSUB', channel(replica))[2] > 0
  end
  return listening[replica]
end

-- After the ledger was lost, rolled back, or out of reach for longer than leases live, it does not know who holds
-- what. Nothing is granted until as many replicas as are known have told, or until they had the time to.
local function look_whether_open()
  local since, till = unpack(call('HMGET', key('state'), 'since', 'until'))
  if now >= number_of(till) then
    return true, 0
  end
  local told = call('ZCOUNT', key('synced'), since, '+inf')
  if told >= math.max(replicas, call('ZCARD', key('alive'))) then
    call('HSET', key('state'), 'until', now)
    return true, 0
  end
  return false, till - now
end

local opening = kept(function()
  return { look_whether_open() }
end, nothing)

local function is_open()
  return unpack(opening.get('now'))
end

local function close()
  call('HSET', key('state'), 'since', now, 'until', now + settle_us)
end

-- Nobody called for so long that leases may have expired although their holders live.
local function close_after_a_gap(seen)
  if seen and math.abs(now - seen) > lease_us / 2 then
    close()
  end
end

-- Slots

local function is_free(worker)
  return load.get(worker) < slots.get(worker)
end

-- A lease lives as long as its replica calls: granted to one that is dead it ends when the others of it do.
local function hold(id, worker)
  local replica = replica_of(id)
  local heard = replica == me and now or number_of(call('ZSCORE', key('alive'), replica) or now)
  local before = load.get(worker)
  load.put(worker, before + call('ZADD', key('held', worker), heard + lease_us, id))
end

-- False if the lease is not held there.
local function free(id, worker)
  local before = load.get(worker)
  local freed = call('ZREM', key('held', worker), id)
  load.put(worker, before - freed)
  return freed == 1
end

-- Each replica would give an adaptive worker a limit; one of them steers: the first by name that can use the worker.
-- The highest or the latest of all limits would undo the look that one takes at a lower limit. nil, nil: not adaptive.
local function limit_of(worker)
  local limits, first, limit = call('HGETALL', key('limit', worker)), nil, nil
  for at = 1, #limits, 2 do
    local replica = limits[at]
    if (not first or replica < first) and number_of(call('HGET', key('view', worker), replica)) > 0 then
      first, limit = replica, tonumber(limits[at + 1])
    end
  end
  return limit, first
end

local function count_slots(worker)
  local most = nil
  for _, seen in ipairs(call('HVALS', key('view', worker))) do
    most = math.max(most or 0, tonumber(seen))
  end
  local limit = limit_of(worker)
  if most and limit then
    most = math.min(most, limit)
  end
  slots.put(worker, most or 0)
  if most or call('EXISTS', key('held', worker)) == 1 then
    call('HSET', key('slots'), worker, most or 0)
  else
    call('HDEL', key('slots'), worker)
  end
end

-- Virtual time

-- Where the tenant's last ticket ended; 0 if virtual time has passed it, which is as good as forgotten.
local function finish_of(band, tenant)
  local finish = number_of(call('ZSCORE', key('finish', band), tenant))
  return finish > virtual.get(band) and finish or 0
end

local function start(place)
  return math.max(virtual.get(place.band), finish_of(place.band, place.tenant))
end

local function put_finish(band, tenant, finish)
  if finish > virtual.get(band) then
    call('ZADD', key('finish', band), finish, tenant)
    if call('ZCARD', key('finish', band)) > TENANTS_KNOWN then
      call('ZREMRANGEBYRANK', key('finish', band), 0, 0)
    end
  else
    call('ZREM', key('finish', band), tenant)
  end
end

local function settle(band, tenant, owed)
  if owed ~= 0 then
    local finish = finish_of(band, tenant)
    if finish > 0 or owed > 0 then
      put_finish(band, tenant, math.max(finish, virtual.get(band)) + owed)
    end
  end
end

local function take(place, worker, tag)
  hold(place.id, worker)
  if tag > virtual.get(place.band) then
    virtual.put(place.band, tag)
  end
  local finish = tag + place.cost / place.weight
  put_finish(place.band, place.tenant, finish)
  return math.max(virtual.get(place.band), finish)
end

-- Waiting

local function count(place, sign)
  local scopes = { 't:' .. place.tenant, 'b:' .. place.band, 'a' }
  for _, scope in ipairs(scopes) do
    depth.put(scope, depth.get(scope) + sign)
    if place.bytes ~= 0 then
      depth.put('#' .. scope, depth.get('#' .. scope) + sign * place.bytes)
    end
  end
  local line = 'l:' .. place.band .. ':' .. place.route
  depth.put(line, depth.get(line) + sign)
end

local function waiting_in(route, from, to)
  local total = 0
  for band = from, to do
    total = total + depth.get('l:' .. band .. ':' .. route)
  end
  return total
end

-- Where it stands in its flow: by arrival, put back by what it is expected to cost.
local function order_of(place)
  return now - place.waited_us + us_per_token * place.cost
end

-- How many are granted first, if all cost the same: the higher bands; of each flow as many as of its own.
local function ahead(place, position, newcomers)
  local flow = key('flow', place.band, place.route, place.tenant)
  local flows = call('ZCARD', key('line', place.band, place.route)) + 1 - call('EXISTS', flow)
  local higher, same = waiting_in(place.route, 0, place.band - 1), waiting_in(place.route, place.band, place.band)
  return higher + math.min(same + newcomers, position * flows)
end

-- At the pace of its own flow, which tells what others take: higher bands, and tenants that do not wait now. A flow that
-- gets nothing is as slow as the time for which its route was granted to others.
local function wait_in_flow(place, position, known)
  local own = flow_drain(place)
  if not own then
    return 0
  end
  return math.floor(position * math.max(known[1] - own[1], own[3] >= DRAIN_TRUSTED and own[2] or 0))
end

-- The longer of what the paces of its route and of its own flow tell of this position in the flow.
local function wait_at(place, position, newcomers)
  local known = drain.get(place.route)
  if not known then
    return 0
  end
  local by_route = math.floor(ahead(place, position, newcomers) * known[2])
  return math.max(by_route, wait_in_flow(place, position, known))
end

local function expected_wait(place)
  local before = '(' .. string.format('%.17g', order_of(place))
  local position = call('ZCOUNT', key('flow', place.band, place.route, place.tenant), '-inf', before) + 1
  return wait_at(place, position, 1)
end

local function refusal(place, wait_us)
  if place.band == MOVED then
    return nil
  end
  local bounds = {
    { TENANT_FULL, 't:' .. place.tenant, tenant_limit, tenant_bytes },
    { BAND_FULL, 'b:' .. place.band, band_limit, band_bytes },
    { QUEUE_FULL, 'a', total_limit, total_bytes },
  }
  for _, bound in ipairs(bounds) do
    local kind, scope, limit, limit_bytes = unpack(bound)
    if depth.get(scope) + 1 > limit or depth.get('#' .. scope) + place.bytes > limit_bytes then
      return kind
    end
  end
  local known = drain.get(place.route)
  if known and known[3] >= DRAIN_TRUSTED and wait_us > place.patience_us then
    return HOPELESS
  end
  return nil
end

local function place_of(fields)
  return {
    id = fields[1], band = fields[2], route = fields[3], candidates = fields[4], tenant = fields[5],
    weight = fields[6], cost = fields[7], patience_us = fields[8], waited_us = fields[9], bytes = fields[10],
    demand = fields[11],
  }
end

local function ticket(id)
  local packed = call('HGET', key('tickets'), id)
  if not packed then
    return nil
  end
  local place = place_of(cmsgpack.unpack(packed))
  place.deadline_us, place.arrived_us = place.patience_us, place.waited_us
  return place
end

local function enqueue(fields, place)
  local arrived, deadline = now - place.waited_us, now + place.patience_us
  local name = place.band .. ':' .. place.route
  local line = key('line', name)
  if waiting_in(place.route, place.band, place.band) == 0 then
    for _, worker in ipairs(place.candidates) do
      call('SADD', key('lines', worker), name)
      lines.put(worker, nil)
    end
  end
  if call('ZADD', line, 'NX', start(place), place.tenant) == 1 then
    put_flow_drain(place, { now, 0, 0 })
  end
  call('ZADD', key('flow', name, place.tenant), order_of(place), place.id)
  if waiting_in(place.route, 0, BANDS - 1) == 0 then
    local known = drain.get(place.route) or { 0, 0, 0 }
    drain.put(place.route, { now, known[2], known[3] })
  end
  count(place, 1)
  fields[8], fields[9], fields[11] = deadline, arrived, nil
  call('HSET', key('tickets'), place.id, cmsgpack.pack(fields))
  call('ZADD', key('deadlines'), deadline, place.id)
end

-- True if others of its flow wait on.
local function dequeue(place)
  local name = place.band .. ':' .. place.route
  call('HDEL', key('tickets'), place.id)
  call('ZREM', key('deadlines'), place.id)
  count(place, -1)
  local flow = key('flow', name, place.tenant)
  call('ZREM', flow, place.id)
  if call('EXISTS', flow) == 1 then
    return true
  end
  call('ZREM', key('line', name), place.tenant)
  call('HDEL', key('drains', name), place.tenant)
  if waiting_in(place.route, place.band, place.band) == 0 then
    for _, worker in ipairs(place.candidates) do
      call('SREM', key('lines', worker), name)
      lines.put(worker, nil)
    end
  end
  return false
end

-- Granting

local granted = {} -- replica -> list of {ticket id, worker}

local function tell(id, worker)
  local replica = replica_of(id)
  granted[replica] = granted[replica] or {}
  table.insert(granted[replica], { id, worker })
end

local function head(band, name)
  local line = key('line', name)
  while true do
    local first = call('ZRANGE', line, 0, 0, 'WITHSCORES')
    if #first == 0 then
      return nil
    end
    local tenant, tag = first[1], tonumber(first[2])
    local finish = finish_of(band, tenant)
    if finish > tag then
      call('ZADD', line, finish, tenant)
    else
      local place = ticket(call('ZRANGE', key('flow', name, tenant), 0, 0)[1])
      if place.deadline_us > now and is_listening(replica_of(place.id)) then
        return tag, place
      end
      dequeue(place)
    end
  end
end

local function level(place)
  return place.band - math.floor((now - place.arrived_us) / ageing_us)
end

local function next_for(worker)
  local first = {}
  for _, name in ipairs(lines.get(worker)) do
    local band = tonumber(string.match(name, '^%d+'))
    local tag, place = head(band, name)
    if tag and (not first[band] or tag < first[band].tag) then
      first[band] = { tag = tag, place = place }
    end
  end
  local best, highest = nil, nil
  for band = 0, BANDS - 1 do
    if first[band] and (not best or level(first[band].place) < highest) then
      best, highest = first[band], level(first[band].place)
    end
  end
  return best
end

local function grant(worker)
  if not is_open() then
    return
  end
  while is_free(worker) do
    local best = next_for(worker)
    if not best then
      return
    end
    local place = best.place
    drain.put(place.route, drained(drain.get(place.route) or { now, 0, 0 }))
    local flow = drained(flow_drain(place) or { now, 0, 0 })
    local stays = dequeue(place)
    local tag = take(place, worker, best.tag)
    if stays then
      put_flow_drain(place, flow)
      call('ZADD', key('line', place.band, place.route), tag, place.tenant)
    end
    tell(place.id, worker)
  end
end

local function workers()
  return call('HKEYS', key('slots'))
end

local function grant_all()
  for _, worker in ipairs(workers()) do
    grant(worker)
  end
end

-- Calls

local function answer(body)
  local mine = granted[me] or {}
  granted[me] = nil
  for replica, grants in pairs(granted) do
    call('PUBLISH', channel(replica), cmsgpack.pack(grants))
  end
  for _, values in ipairs(written) do
    values.write_back()
  end
  local _, opens_in_us = look_whether_open()
  local reply = cmsgpack.pack({ OK, opens_in_us, mine, body })
  call('HSET', key('calls'), me, number)
  call('HSET', key('replies'), me, reply)
  call('HSET', key('state'), 'seen', now)
  call('ZADD', key('alive'), now, me)
  return reply
end

-- What a call finds out before it changes anything; a reply if it must not. The same call twice is answered alike,
-- an older one has no effect, and a ledger that has forgotten calls which it answered was rolled back.
local function objection()
  local current, seen = unpack(call('HMGET', key('state'), 'epoch', 'seen'))
  local last = tonumber(call('HGET', key('calls'), me) or -1)
  if current ~= epoch or last < answered then
    return cmsgpack.pack({ RESYNC, 0, {}, {} })
  elseif number == last then
    return call('HGET', key('replies'), me)
  elseif number < last then
    return cmsgpack.pack({ STALE, 0, {}, {} })
  end
  close_after_a_gap(seen)
  return nil
end
