-- Integer microseconds of the server's clock: the only clock that replicas share.
local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
