-- The limits of quota.py on shared state.
--
--   spent:LIMIT:TENANT hash    a meter: `sum` of what is taken as of the sixtieth `at`, `last` that something was taken
--                              in, and sixtieth -> what was taken in it. Expires when all has come back
--   reserved           hash    reservation -> {tenant, time, claims}. An id names its replica, as a ticket's does
--   live:TENANT        set     the tenant's reservations
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

local function meter_of(tenant, claim)
  local limit, _, window_us = unpack(claim)
  local name = key('spent', limit, tenant)
  if not meters[name] then
    local width = window_us / SLICES
    local current = math.floor(now / width)
    local sum, at, last, taken = unpack(call('HMGET', name, 'sum', 'at', 'last', current))
    local meter = {
      name = name, width = width, current = current, sum = number_of(sum), last = number_of(last),
      slices = { [current] = number_of(taken) }, changed = {},
    }
    if at and tonumber(at) ~= current then
      roll(meter)
    end
    meters[name] = meter
  end
  return meters[name]
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
    for _, meter in pairs(meters) do
      if meter.is_changed then
        write_back(meter)
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
  for _, claim in ipairs(claims) do
    local meter = meter_of(tenant, claim)
    table.insert(found, { meter.sum, meter.sum > 0 and returns_us(meter, meter.last) or 0 })
  end
  return found
end

-- {kind, wait in us} of the limits that refuse a place, or nothing.
local function over_limits(place)
  if not place.demand then
    return nil
  end
  local id, concurrent, claims = unpack(place.demand)
  if call('HEXISTS', key('reserved'), id) == 1 then
    return nil
  end
  local wait_us = nil
  for _, claim in ipairs(claims) do
    local meter = meter_of(place.tenant, claim)
    local excess = meter.sum + claim[4] - claim[2]
    if excess > 0 then
      wait_us = math.max(wait_us or 0, wait_for(meter, excess))
    end
  end
  if wait_us then
    return { RATE_LIMITED, wait_us }
  elseif concurrent ~= 0 and call('SCARD', key('live', place.tenant)) >= concurrent then
    return { TOO_MANY, 0 }
  end
  return nil
end

-- False if it is reserved already.
local function hold_reservation(id, tenant, taken_us, claims)
  local is_new = call('HSETNX', key('reserved'), id, cmsgpack.pack({ tenant, taken_us, claims })) == 1
  if is_new then
    call('SADD', key('live', tenant), id)
  end
  return is_new
end

local function reserve(place)
  if place.demand then
    local id, _, claims = unpack(place.demand)
    if hold_reservation(id, place.tenant, now, claims) then
      for _, claim in ipairs(claims) do
        take_of(meter_of(place.tenant, claim), claim[4])
      end
    end
  end
end

-- What was reserved, no longer live; nothing if it is not known.
local function end_reservation(id)
  local packed = call('HGET', key('reserved'), id)
  if not packed then
    return nil
  end
  local reserved = cmsgpack.unpack(packed)
  call('HDEL', key('reserved'), id)
  call('SREM', key('live', reserved[1]), id)
  return reserved
end

local function settle_reservation(id, amounts)
  local reserved = end_reservation(id)
  if not reserved then
    return
  end
  local tenant, taken_us, claims = unpack(reserved)
  for index, claim in ipairs(claims) do
    local meter, beyond = meter_of(tenant, claim), amounts[index] - claim[4]
    if beyond < 0 then
      give_back(meter, -beyond, taken_us)
    else
      take_of(meter, beyond)
    end
  end
end
