-- depends: 0007_columnstore

-- What one device measured in a piece of time.
--   readings       how many
--   kwh_sum        the sum of their kWh: the energy, for a device of kind interval
--   kwh_increase   the sum of the steps inside the piece: part of the energy, for a register
--   kwh_first/last the piece's first and last kWh, by ts: the steps between pieces need them
--   temp_sum       degrees Celsius, summed; 0 for a meter
CREATE TYPE piece_measures AS (
  readings      bigint,
  kwh_sum       float8,
  kwh_increase  float8,
  kwh_first     float8,
  kwh_last      float8,
  temp_sum      float8
);

-- The row of vehicle_performance_v1(). A type, so that the function's arguments can have the names
-- of the columns.
CREATE TYPE vehicle_performance AS (
  vehicle_id                text,
  since                     timestamptz,
  until                     timestamptz,
  total_kwh_consumed_ac     float8,
  total_kwh_delivered_dc    float8,
  efficiency_ratio          float8,
  average_battery_temp      float8,
  metered_kwh_delivered_dc  float8,
  ac_readings               bigint,
  dc_readings               bigint,
  ac_coverage               float8,
  dc_coverage               float8,
  verdict                   text
);
