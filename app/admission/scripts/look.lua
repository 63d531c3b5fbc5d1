-- payload: {tenant, claims}. body: {flows: {band, route, candidates, tenant, tickets, oldest in us}, drains: {route,
-- gap, count}, slots: {worker, held, slots}, usages: {tenant, live, readings}}. Changes nothing, and so has no number.

local found, drains, held, seen, usages = {}, {}, {}, {}, {}
for _, id in ipairs(call('HKEYS', key('tickets'))) do
  local place = ticket(id)
  local name = table.concat({ place.band, place.route, place.tenant }, ':')
  found[name] = found[name] or { place.band, place.route, place.candidates, place.tenant, 0, 0 }
  local flow = found[name]
  flow[5], flow[6] = flow[5] + 1, math.max(flow[6], now - place.arrived_us)
  local known = drain.get(place.route)
  if known and not seen[place.route] then
    seen[place.route] = true
    table.insert(drains, { place.route, known[2], known[3] })
  end
end
local flows = {}
for _, flow in pairs(found) do
  table.insert(flows, flow)
end
for _, worker in ipairs(workers()) do
  table.insert(held, { worker, load.get(worker), slots.get(worker) })
end
for _, metered in ipairs(payload) do
  local tenant, claims = unpack(metered)
  table.insert(usages, { tenant, live.get(tenant), readings(tenant, claims) })
end
return cmsgpack.pack({ OK, 0, {}, { flows, drains, held, usages } })
