-- depends: 0009_rollup_probe

-- Corrections: an administrator voids readings of a device, or replaces them. History then holds what
-- is valid, and what was there before is kept here, with who, when and why. A reading that is kept here
-- is known to ingest: when it is sent again it is a duplicate and stays out of history.

CREATE TABLE correction (
  correction_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  device_class   text             NOT NULL CHECK (device_class IN ('meter', 'vehicle')),
  device_id      text COLLATE "C" NOT NULL,
  during         tstzrange        NOT NULL
                 CHECK (NOT isempty(during) AND lower_inc(during) AND NOT upper_inc(during)),
  action         text             NOT NULL CHECK (action IN ('void', 'replace')),
  reason         text             NOT NULL,
  made_by        text             NOT NULL,
  made_at        timestamptz      NOT NULL,
  voided         bigint           NOT NULL,
  stored         bigint           NOT NULL
);

CREATE INDEX correction_device_idx ON correction (device_id, correction_id);

CREATE TABLE corrected_meter_reading (
  meter_id         text COLLATE "C" NOT NULL,
  ts               timestamptz      NOT NULL,
  kwh_consumed_ac  float8           NOT NULL,
  voltage          float8           NOT NULL,
  received_at      timestamptz      NOT NULL,
  correction_id    bigint           NOT NULL REFERENCES correction,
  PRIMARY KEY (meter_id, ts, correction_id)
);

CREATE TABLE corrected_vehicle_reading (
  vehicle_id        text COLLATE "C" NOT NULL,
  ts                timestamptz      NOT NULL,
  soc               float8           NOT NULL,
  kwh_delivered_dc  float8           NOT NULL,
  battery_temp      float8           NOT NULL,
  received_at       timestamptz      NOT NULL,
  correction_id     bigint           NOT NULL REFERENCES correction,
  PRIMARY KEY (vehicle_id, ts, correction_id)
);

CREATE INDEX corrected_meter_reading_correction_idx ON corrected_meter_reading (correction_id, ts);
CREATE INDEX corrected_vehicle_reading_correction_idx ON corrected_vehicle_reading (correction_id, ts);
