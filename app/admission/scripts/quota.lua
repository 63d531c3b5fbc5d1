-- The limits of quota.py on shared state.
--
--   spent:LIMIT:TENANT hash    a meter: `sum` of what is taken as of the sixtieth `at`, `last` that something was taken
--                              in, and sixtieth -> what was taken in it. Expires when all has come back
--   reserved:TENANT    hash    reservation -> when its claims were taken: all that are live. An id names its replica
--   reserving          set     the tenants that have any
--   told               hash    replica -> number of the last of what it gave by itself and told

local RATE_LIMITED, TOO_MANY = 6, 7
local SLICES = 60

local meters = {}

local function put(meter, slice, amount)
  meter.slices[slice], meter.changed[slice], meter.is_changed = amount, true, true
end

-- All that is taken, by sixtieths.
local function slices_of(meter)
  if not meter.is_whole then
    local fields = call('HGETALL', meter.name)
    for index = 1, #fields, 2 do
      local slice = tonumber(fields[index])
      if slice and not meter.slices[slice] then
        meter.slices[slice] = tonumber(fields[index + 1])
      end
    end
    meter.is_whole = true
  end
  return meter.slices
end

-- Once in a sixtieth. What has left the window is dropped; what is dated later than now, by a clock set back, is of now.
local function roll(meter)
  local later, found = 0, {}
  meter.sum, meter.last, meter.is_changed = 0, math.min(meter.last, meter.current), true
  for slice, amount in pairs(slices_of(meter)) do
    found[slice] = amount
  end
  for slice, amount in pairs(found) do
    if slice < meter.current - SLICES then
      put(meter, slice, 0)
    else
      meter.sum = meter.sum + amount
      if slice > meter.current then
        later = later + amount
        put(meter, slice, 0)
      end
    end
  end
  put(meter, meter.current, meter.slices[meter.current] + later)
end

local function read(name, width)
  local current = math.floor(now / width)
  local sum, at, last, taken = unpack(call('HMGET', name, 'sum', 'at', 'last', current))
  local meter = {
    name = name, width = width, current = current, sum = number_of(sum), last = number_of(last),
    slices = { [current] = number_of(taken) }, changed = {},
  }
  if at and tonumber(at) ~= current then
    roll(meter)
  end
  return meter
end

local function meter_of(tenant, claim)
  local limit = claim[1]
  local known = meters[tenant]
  if not known then
    known = {}
    meters[tenant] = known
  end
  local meter = known[limit]
  if not meter then
    meter = read(key('spent', limit, tenant), claim[3] / SLICES)
    known[limit] = meter
  end
  return meter
end

local function taken_in(meter, slice)
  if not meter.slices[slice] then
    meter.slices[slice] = number_of(call('HGET', meter.name, slice))
  end
  return meter.slices[slice]
end

local function take_of(meter, amount)
  if amount > 0 then
    meter.sum, meter.last = meter.sum + amount, meter.current
    put(meter, meter.current, taken_in(meter, meter.current) + amount)
  end
end

-- What was taken elsewhere, then.
local function take_as_of(meter, amount, taken_us)
  local slice = math.min(math.floor(taken_us / meter.width), meter.current)
  if slice >= meter.current - SLICES then
    meter.sum, meter.last = meter.sum + amount, math.max(meter.last, slice)
    put(meter, slice, taken_in(meter, slice) + amount)
  end
end

local function give_back(meter, amount, taken_us)
  local slice = math.floor(taken_us / meter.width)
  if slice >= meter.current - SLICES and slice <= meter.current then
    local undone = math.min(amount, taken_in(meter, slice))
    meter.sum = meter.sum - undone
    put(meter, slice, meter.slices[slice] - undone)
  end
end

local function write_back(meter)
  local fields, gone = { 'sum', meter.sum, 'at', meter.current, 'last', meter.last }, {}
  for slice in pairs(meter.changed) do
    if meter.slices[slice] > 0 then
      table.insert(fields, slice)
      table.insert(fields, meter.slices[slice])
    else
      table.insert(gone, slice)
    end
  end
  call('HSET', meter.name, unpack(fields))
  if #gone > 0 then
    call('HDEL', meter.name, unpack(gone))
  end
  call('PEXPIRE', meter.name, math.ceil(meter.width * (SLICES + 1) / 1000))
end

table.insert(written, {
  write_back = function()
    for _, known in pairs(meters) do
      for _, meter in pairs(known) do
        if meter.is_changed then
          write_back(meter)
        end
      end
    end
  end,
})

local function returns_us(meter, slice)
  return (slice + SLICES + 1) * meter.width - now
end

local function wait_for(meter, excess)
  local order = {}
  for slice, amount in pairs(slices_of(meter)) do
    if amount > 0 then
      table.insert(order, slice)
    end
  end
  table.sort(order)
  for _, slice in ipairs(order) do
    excess = excess - meter.slices[slice]
    if excess <= 0 then
      return returns_us(meter, slice)
    end
  end
  return meter.width * SLICES
end

-- {used, reset in us} of each claim.
local function readings(tenant, claims)
  local found = {}
  for index, claim in ipairs(claims) do
    local meter = meter_of(tenant, claim)
    found[index] = { meter.sum, meter.sum > 0 and returns_us(meter, meter.last) or 0 }
  end
  return found
end

-- How many reservations of a tenant are live.
local live = kept(function(tenant)
  return call('HLEN', key('reserved', tenant))
end, nothing)

-- {kind, wait in us} of the limits that refuse a place, or nothing.
local function over_limits(place)
  if not place.demand then
    return nil
  end
  local id, concurrent, claims = unpack(place.demand)
  local wait_us = nil
  for _, claim in ipairs(claims) do
    local meter = meter_of(place.tenant, claim)
    local excess = meter.sum + claim[4] - claim[2]
    if excess > 0 then
      wait_us = math.max(wait_us or 0, wait_for(meter, excess))
    end
  end
  local is_crowded = concurrent ~= 0 and live.get(place.tenant) >= concurrent
  if not (wait_us or is_crowded) or call('HEXISTS', key('reserved', place.tenant), id) == 1 then
    return nil
  end
  return wait_us and { RATE_LIMITED, wait_us } or { TOO_MANY, 0 }
end

-- False if it is live already.
local function hold_reservation(id, tenant, taken_us)
  local before = live.get(tenant)
  if call('HSETNX', key('reserved', tenant), id, taken_us) == 0 then
    return false
  end
  live.put(tenant, before + 1)
  if before == 0 then
    call('SADD', key('reserving'), tenant)
  end
  return true
end

local function reserve(place)
  if place.demand then
    local id, _, claims = unpack(place.demand)
    if hold_reservation(id, place.tenant, now) then
      for _, claim in ipairs(claims) do
        take_of(meter_of(place.tenant, claim), claim[4])
      end
    end
  end
end

-- When it was made that is no longer live; nothing if it is not known.
local function end_reservation(id, tenant)
  local name = key('reserved', tenant)
  local taken_us, before = call('HGET', name, id), live.get(tenant)
  if not taken_us then
    return nil
  end
  call('HDEL', name, id)
  live.put(tenant, before - 1)
  if before == 1 then
    call('SREM', key('reserving'), tenant)
  end
  return tonumber(taken_us)
end

-- End those, of all tenants, whose ids `is_over` tells.
local function end_reservations(is_over)
  for _, tenant in ipairs(call('SMEMBERS', key('reserving'))) do
    for _, id in ipairs(call('HKEYS', key('reserved', tenant))) do
      if is_over(id) then
        end_reservation(id, tenant)
      end
    end
  end
end

local function settle_reservation(id, tenant, claims, amounts)
  local taken_us = end_reservation(id, tenant)
  if not taken_us then
    return
  end
  for index, claim in ipairs(claims) do
    local meter, beyond = meter_of(tenant, claim), amounts[index] - claim[4]
    if beyond < 0 then
      give_back(meter, -beyond, taken_us)
    else
      take_of(meter, beyond)
    end
  end
end
