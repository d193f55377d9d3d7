-- depends: 0011_plausibility

-- The row of charging_session_v1().
CREATE TYPE charging_session AS (
  vehicle_id              text,
  meter_id                text,
  started_at              timestamptz,
  ended_at                timestamptz,
  total_kwh_consumed_ac   float8,
  total_kwh_delivered_dc  float8,
  efficiency_ratio        float8,
  average_battery_temp    float8,
  battery_temp_min        float8,
  battery_temp_max        float8,
  soc_start               float8,
  soc_end                 float8,
  ac_readings             bigint,
  dc_readings             bigint,
  is_open                 boolean
);
