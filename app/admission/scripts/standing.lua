-- payload: ticket ids. body: {position in its flow, tickets of the flow, expected wait in us} of each; zeros for one that
-- does not wait. Changes nothing, and so has no number.

local function standing(id)
  local place = ticket(id)
  if not place then
    return { 0, 0, 0 }
  end
  local flow = key('flow', place.band, place.route, place.tenant)
  local position = call('ZRANK', flow, id) + 1
  return { position, call('ZCARD', flow), wait_at(place, position, 0) }
end

local found = {}
for index, id in ipairs(payload) do
  found[index] = standing(id)
end
return cmsgpack.pack({ OK, 0, {}, found })
