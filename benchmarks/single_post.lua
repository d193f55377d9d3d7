-- wrk script: one reading a request, both kinds in turn, 5,000 devices each, in the order of time:
-- a device's next reading is a second later, within the last 50 minutes.
local count = 0
local first
local began = os.time()

function init()
  first = math.random(1, 1000000)
end

function request()
  count = count + 1
  local device = count % 10000
  local at = began - 3000 + math.floor(count / 10000)
  local instant = os.date("!%Y-%m-%dT%H:%M:%S", at) .. string.format(".%06dZ", first % 1000000)
  local headers = { ["Content-Type"] = "application/json" }
  local body
  if count % 2 == 0 then
    body = string.format('{"meterId":"B-%d","kwhConsumedAc":%.3f,"voltage":230,"timestamp":"%s"}',
      device, count % 100 / 100, instant)
  else
    body = string.format(
      '{"vehicleId":"B-%d","soc":75,"kwhDeliveredDc":%.3f,"batteryTemp":36,"timestamp":"%s"}',
      device, count % 100 / 100, instant)
  end
  return wrk.format("POST", "/v1/ingest", headers, body)
end
