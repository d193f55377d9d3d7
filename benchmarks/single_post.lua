-- wrk script: a reading a request, from 5,000 meters and 5,000 vehicles in turn. All of them report once,
-- in an order that has nothing to do with their ids; a step later all of them report again.
--
-- SINCE is the first instant, in ms since the epoch. STEP_MS is the same in ingest_single.py.
local DEVICES, STEP_MS = 10000, 100

local count = 0
local at = tonumber(os.getenv("SINCE"))
local head, instant

local function tell_instant()
  local seconds = math.floor(at / 1000)
  instant = os.date("!%Y-%m-%dT%H:%M:%S", seconds) .. string.format(".%03dZ", at - seconds * 1000)
end

function init()
  head = "POST " .. wrk.path .. " HTTP/1.1\r\nHost: " .. wrk.headers["Host"]
    .. "\r\nContent-Type: application/json\r\nContent-Length: "
  tell_instant()
end

function request()
  if count == DEVICES then
    count = 0
    at = at + STEP_MS
    tell_instant()
  end
  count = count + 1
  -- 22 kW are 0.0006 kWh within a step.
  local device, kwh = count * 3571 % DEVICES, count % 7 / 1e4
  local body
  if device % 2 == 0 then
    body = string.format('{"meterId":"M-%05d","kwhConsumedAc":%.4f,"voltage":230.5,"timestamp":"%s"}',
      device, kwh, instant)
  else
    body = string.format(
      '{"vehicleId":"V-%05d","soc":75.5,"kwhDeliveredDc":%.4f,"batteryTemp":36.5,"timestamp":"%s"}',
      device, kwh, instant)
  end
  return head .. #body .. "\r\n\r\n" .. body
end
