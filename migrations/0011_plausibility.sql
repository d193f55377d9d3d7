-- depends: 0010_corrections

-- What a device can do, by class. Over a hard limit a reading is not taken; over a soft one it is stored
-- and flagged. NULL: no such limit. No hard limit is set to begin with: nothing is refused by a guess,
-- least of all of a register that nobody has declared yet.
CREATE TABLE plausibility_limit (
  device_class    text PRIMARY KEY CHECK (device_class IN ('meter', 'vehicle')),
  power_kw_soft      float8 CHECK (power_kw_soft >= 0),
  power_kw_hard      float8 CHECK (power_kw_hard >= 0),
  step_kwh_soft       float8 CHECK (step_kwh_soft >= 0),
  step_kwh_hard       float8 CHECK (step_kwh_hard >= 0),
  temp_rate_soft  float8 CHECK (temp_rate_soft >= 0),
  temp_rate_hard  float8 CHECK (temp_rate_hard >= 0),
  soc_rate_soft   float8 CHECK (soc_rate_soft >= 0),
  soc_rate_hard   float8 CHECK (soc_rate_hard >= 0),
  CHECK (power_kw_soft <= power_kw_hard),
  CHECK (step_kwh_soft <= step_kwh_hard),
  CHECK (temp_rate_soft <= temp_rate_hard),
  CHECK (soc_rate_soft <= soc_rate_hard)
);

INSERT INTO plausibility_limit (device_class, power_kw_soft, step_kwh_soft, temp_rate_soft, soc_rate_soft)
VALUES ('meter', 500, 1000, NULL, NULL), ('vehicle', 500, 1000, 5, 15);

-- The readings of history that are not plausible, each with the reason.
CREATE TABLE suspect_reading (
  suspect_id    bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
  device_class  text             NOT NULL,
  device_id     text COLLATE "C" NOT NULL,
  ts            timestamptz      NOT NULL,
  code          text             NOT NULL,
  detail        text             NOT NULL,
  PRIMARY KEY (device_class, device_id, ts, code)
);

CREATE INDEX suspect_reading_ts_idx ON suspect_reading (ts);
CREATE INDEX suspect_reading_code_idx ON suspect_reading (code, suspect_id);

-- The reading before the newest. The upsert sets it from the row that it has locked, so ingest can tell
-- whether another writer has been there since its snapshot.
ALTER TABLE meter_live_status ADD COLUMN previous_ts timestamptz;
ALTER TABLE vehicle_live_status ADD COLUMN previous_ts timestamptz;

-- A reading of either class, as it is judged; soc and temp are NULL for a meter.
CREATE TYPE judged_reading AS (
  ts           timestamptz,
  kwh          float8,
  soc          float8,
  temp         float8,
  received_at  timestamptz
);

ALTER TYPE vehicle_performance ADD ATTRIBUTE suspect_readings bigint;

-- Its place is taken by unrolled_hours(), which also sees what a correction has changed.
DROP FUNCTION IF EXISTS unrolled_readings(text, timestamptz);
