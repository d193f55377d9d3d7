-- wrk script: the 24 h answer of a random vehicle of a simulated fleet (V-00001 ..).
local vehicles = tonumber(os.getenv("VEHICLES") or "200")

function init()
  math.randomseed(os.time())
end

function request()
  return wrk.format("GET", string.format("/v1/analytics/performance/V-%05d", math.random(1, vehicles)))
end
