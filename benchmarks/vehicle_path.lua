-- wrk script: GETs of PATH, in which {vehicle} is a random one of the seeded vehicles V-S00001 ..
local path = os.getenv("PATH_TEMPLATE")
local vehicles = tonumber(os.getenv("VEHICLES"))

function init()
  math.randomseed(os.time())
end

function request()
  local vehicle = string.format("V-S%05d", math.random(1, vehicles))
  return wrk.format("GET", (path:gsub("{vehicle}", vehicle)))
end
