-- payload: {releases: {id, worker, band, tenant, owed}, cancels: {id, candidates, band, tenant, owed},
-- settlements: {reservation, tenant, claims, amounts}}. body: {}. A lease, ticket or reservation that is not there changes nothing.

local freed = {}

local function release(id, worker, band, tenant, owed)
  if free(id, worker) then
    settle(band, tenant, owed)
    table.insert(freed, worker)
  end
end

local objected = objection()
if objected then
  return objected
end
for _, fields in ipairs(payload[1]) do
  release(unpack(fields))
end
for _, fields in ipairs(payload[2]) do
  local id, candidates, band, tenant, owed = unpack(fields)
  local place = ticket(id)
  if place then
    dequeue(place)
  else -- its grant is on its way, or was lost
    for _, worker in ipairs(candidates) do
      release(id, worker, band, tenant, owed)
    end
  end
end
for _, settlement in ipairs(payload[3]) do
  settle_reservation(unpack(settlement))
end
for _, worker in ipairs(freed) do
  grant(worker)
end
return answer({})
