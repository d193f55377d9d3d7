-- History: every reading, append only. Live: the newest reading of each device.
-- Ids are ASCII by contract; collation "C" compares them as bytes, on every server alike.

CREATE TABLE meter_telemetry_history (
  meter_id         text COLLATE "C" NOT NULL,
  ts               timestamptz      NOT NULL,
  kwh_consumed_ac  float8           NOT NULL,
  voltage          float8           NOT NULL,
  received_at      timestamptz      NOT NULL,
  PRIMARY KEY (meter_id, ts)
);

SELECT create_hypertable('meter_telemetry_history', by_range('ts', INTERVAL '1 day'),
                         create_default_indexes => false);

CREATE TABLE vehicle_telemetry_history (
  vehicle_id        text COLLATE "C" NOT NULL,
  ts                timestamptz      NOT NULL,
  soc               float8           NOT NULL,
  kwh_delivered_dc  float8           NOT NULL,
  battery_temp      float8           NOT NULL,
  received_at       timestamptz      NOT NULL,
  PRIMARY KEY (vehicle_id, ts)
);

SELECT create_hypertable('vehicle_telemetry_history', by_range('ts', INTERVAL '1 day'),
                         create_default_indexes => false);

-- Half of each page stays free: a live row is updated in place (HOT), once a minute for ever.
CREATE TABLE meter_live_status (
  meter_id         text COLLATE "C" PRIMARY KEY,
  ts               timestamptz      NOT NULL,
  kwh_consumed_ac  float8           NOT NULL,
  voltage          float8           NOT NULL,
  received_at      timestamptz      NOT NULL
) WITH (fillfactor = 50);

CREATE TABLE vehicle_live_status (
  vehicle_id        text COLLATE "C" PRIMARY KEY,
  ts                timestamptz      NOT NULL,
  soc               float8           NOT NULL,
  kwh_delivered_dc  float8           NOT NULL,
  battery_temp      float8           NOT NULL,
  received_at       timestamptz      NOT NULL
) WITH (fillfactor = 50);
