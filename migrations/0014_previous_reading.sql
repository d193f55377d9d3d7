-- depends: 0013_schema_fingerprint

-- The reading before the newest, as far as it came before that. The upsert that moves a live row forward
-- takes it from the row that it has locked, and so knows what the new reading follows, whoever else
-- writes.
ALTER TABLE meter_live_status
  ADD COLUMN previous_kwh_consumed_ac float8,
  ADD COLUMN previous_received_at timestamptz;
ALTER TABLE vehicle_live_status
  ADD COLUMN previous_soc float8,
  ADD COLUMN previous_kwh_delivered_dc float8,
  ADD COLUMN previous_battery_temp float8,
  ADD COLUMN previous_received_at timestamptz;

-- Readings of one device that follow upon each other, as they are judged: with when it read before them,
-- and where what is to be judged ends, which is at the reading after them.
CREATE TYPE judged_run AS (
  device       text,
  since        timestamptz,
  until        timestamptz,
  previous_ts  timestamptz,
  last_ts      timestamptz
);
