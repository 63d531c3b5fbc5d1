-- payload: {leases: {id, worker}, tickets: ids, slots: {worker, slots}, new epoch, limits: {worker, limit}, reservations:
-- {id, tenant, age in us, claims, what is heard of it}, given: {number, {tenant, limit, window, age in us, amount}},
-- run id of the server}: all that the replica holds, waits for, sees, has reserved and gave by itself. It is made so
-- here: leases are renewed, or taken again while there is room; reservations are noted again, but nothing is taken for
-- them twice; what the replica does not know is removed. body: {epoch, ids of leases without a slot, ids of tickets that
-- do not wait here, limits that others set: {worker, limit}, how many replicas are alive}.

local leases, tickets, views, new_epoch, limits, reservations, given, run_id = unpack(payload)
local holds, waits, sees, reserves = {}, {}, {}, {}
for _, lease in ipairs(leases) do
  holds[lease[1]] = lease[2]
end
for _, id in ipairs(tickets) do
  waits[id] = true
end
for _, view in ipairs(views) do
  sees[view[1]] = view[2]
end

-- A server that was started or promoted since may have lost what the one before it did last, for whichever replica.
local function join()
  local current, seen, server = unpack(call('HMGET', key('state'), 'epoch', 'seen', 'server'))
  local last = tonumber(call('HGET', key('calls'), me) or -1)
  local was_rolled_back = current == epoch and last >= 0 and last < answered
  local is_another = server and run_id ~= '' and server ~= run_id
  if run_id ~= '' then
    call('HSET', key('state'), 'server', run_id)
  end
  if not current or was_rolled_back or is_another then
    call('HSET', key('state'), 'epoch', new_epoch)
    close()
    current = new_epoch
  else
    close_after_a_gap(seen)
  end
  call('ZADD', key('alive'), now, me)
  call('ZADD', key('synced'), now, me)
  return current
end

local function see()
  for _, given in ipairs(limits) do
    call('HSET', key('limit', given[1]), me, given[2])
  end
  for worker, slots in pairs(sees) do
    call('HSET', key('view', worker), me, slots)
    count_slots(worker)
  end
  for _, worker in ipairs(workers()) do
    if not sees[worker] and call('HDEL', key('view', worker), me) == 1 then
      call('HDEL', key('limit', worker), me)
      count_slots(worker)
    end
  end
end

-- A lease that the replica waits for was granted, and the word of it was lost on the way.
local function renew(worker)
  for _, id in ipairs(call('ZRANGE', key('held', worker), 0, -1)) do
    if replica_of(id) == me then
      if holds[id] == worker then
        hold(id, worker)
        holds[id] = nil
      elseif waits[id] then
        hold(id, worker)
        waits[id] = nil
        tell(id, worker)
      else
        free(id, worker)
      end
    end
  end
end

-- One that nothing is heard of is on its way, or its arrival was lost: its ticket will arrive again and tell.
local NOTHING, GIVEN = 0, 2
local function renew_reservations()
  for _, reservation in ipairs(reservations) do
    local id, tenant, age_us, claims, heard = unpack(reservation)
    reserves[id] = true
    if heard ~= NOTHING and hold_reservation(id, tenant, now - age_us) and heard == GIVEN then
      for _, claim in ipairs(claims) do
        take_as_of(meter_of(tenant, claim), claim[4], now - age_us)
      end
    end
  end
  end_reservations(function(id)
    return replica_of(id) == me and not reserves[id]
  end)
end

-- What the replica gave of limits while it could not ask, to requests that have ended, once.
local function take_what_was_given()
  for _, episode in ipairs(given) do
    local episode_number, takings = unpack(episode)
    if episode_number > number_of(call('HGET', key('told'), me)) then
      call('HSET', key('told'), me, episode_number)
      for _, taking in ipairs(takings) do
        local tenant, limit, window_us, age_us, amount = unpack(taking)
        take_as_of(meter_of(tenant, { limit, 0, window_us }), amount, now - age_us)
      end
    end
  end
end

local last = tonumber(call('HGET', key('calls'), me) or -1)
if answered <= last then
  if number == last then
    return call('HGET', key('replies'), me)
  elseif number < last then
    return cmsgpack.pack({ STALE, 0, {}, {} })
  end
end
local current = join()
see()
for _, worker in ipairs(workers()) do
  renew(worker)
end
for _, id in ipairs(call('HKEYS', key('tickets'))) do
  if replica_of(id) == me and not waits[id] then
    dequeue(ticket(id))
  end
end
take_what_was_given()
renew_reservations()
local lost, missing = {}, {}
for _, lease in ipairs(leases) do
  local id, worker = lease[1], lease[2]
  if holds[id] then
    if is_free(worker) then
      hold(id, worker)
    else
      table.insert(lost, id)
    end
  end
end
for _, id in ipairs(tickets) do
  if waits[id] and call('HEXISTS', key('tickets'), id) == 0 then
    table.insert(missing, id)
  end
end
local steered = {}
for _, given in ipairs(limits) do
  local limit, steers = limit_of(given[1])
  if steers and steers ~= me then
    table.insert(steered, { given[1], limit })
  end
end
grant_all()
return answer({ current, lost, missing, steered, call('ZCARD', key('alive')) })
