-- payload: places. body: {kind, worker or expected wait in us, readings of its claims} of each.

local function known(place)
  for _, worker in ipairs(place.candidates) do
    if call('ZSCORE', key('held', worker), place.id) then
      return { GRANTED, worker }
    end
  end
  if call('HEXISTS', key('tickets'), place.id) == 1 then
    return { WAITS, expected_wait(place) }
  end
  return nil
end

local function at_once(place)
  for _, worker in ipairs(place.candidates) do
    if is_free(worker) and #lines.get(worker) == 0 then
      take(place, worker, start(place))
      return { GRANTED, worker }
    end
  end
  return nil
end

local function wait(fields, place)
  local wait_us = expected_wait(place)
  local refused = refusal(place, wait_us)
  if refused then
    return { refused, wait_us }
  end
  enqueue(fields, place)
  for _, worker in ipairs(place.candidates) do
    grant(worker)
  end
  return { WAITS, wait_us }
end

local function arrive(fields, place, open)
  local outcome = over_limits(place) or (open and at_once(place)) or wait(fields, place)
  if outcome[1] <= WAITS then
    reserve(place)
  end
  return outcome
end

local objected = objection()
if objected then
  return objected
end
local body, open = {}, is_open()
for index, fields in ipairs(payload) do
  local place = place_of(fields)
  place.waited_us = place.waited_us - (index - 1) -- keeps those apart, in their order, that arrive in one call
  body[index] = known(place) or arrive(fields, place, open)
  body[index][3] = place.demand and readings(place.tenant, place.demand[3]) or nil
end
return answer(body)
