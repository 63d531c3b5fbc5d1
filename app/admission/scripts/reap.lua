-- payload: {}. body: {leases reaped, tickets expired, replicas gone}. Ends what nobody holds any more, and grants
-- whatever slot is free.

local reaped, expired, gone = 0, 0, 0
local MOST = 1000

local function reap_leases()
  for _, worker in ipairs(workers()) do
    for _, id in ipairs(call('ZRANGEBYSCORE', key('held', worker), '-inf', now)) do
      free(id, worker)
      reaped = reaped + 1
    end
  end
end

local function reap_replicas()
  local dead = {}
  for _, replica in ipairs(call('ZRANGEBYSCORE', key('alive'), '-inf', now - lease_us)) do
    if replica ~= me then
      dead[replica], gone = true, gone + 1
      call('ZREM', key('alive'), replica)
      call('ZREM', key('synced'), replica)
      call('HDEL', key('calls'), replica)
      call('HDEL', key('replies'), replica)
      call('HDEL', key('told'), replica)
      for _, worker in ipairs(workers()) do
        call('HDEL', key('view', worker), replica)
        call('HDEL', key('limit', worker), replica)
        count_slots(worker)
      end
    end
  end
  if gone > 0 then
    for _, id in ipairs(call('HKEYS', key('tickets'))) do
      if dead[replica_of(id)] then
        dequeue(ticket(id))
      end
    end
    end_reservations(function(id) -- what they took comes back with the window
      return dead[replica_of(id)]
    end)
  end
end

local objected = objection()
if objected then
  return objected
end
if is_open() then
  reap_leases()
  reap_replicas()
end
for _, id in ipairs(call('ZRANGEBYSCORE', key('deadlines'), '-inf', now, 'LIMIT', 0, MOST)) do
  dequeue(ticket(id))
  expired = expired + 1
end
grant_all()
return answer({ reaped, expired, gone })
