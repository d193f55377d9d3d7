-- depends: 0001_telemetry

-- The device registry and the ledger of which meter fed which vehicle when.

CREATE TABLE meter (
  meter_id            text COLLATE "C" PRIMARY KEY,
  energy_kind         text             NOT NULL DEFAULT 'interval'
                      CHECK (energy_kind IN ('interval', 'register')),
  reporting_interval  interval         NOT NULL DEFAULT INTERVAL '60 seconds'
                      CHECK (reporting_interval > INTERVAL '0'),
  registered_at       timestamptz      NOT NULL DEFAULT now()
);

CREATE TABLE vehicle (
  vehicle_id          text COLLATE "C" PRIMARY KEY,
  energy_kind         text             NOT NULL DEFAULT 'interval'
                      CHECK (energy_kind IN ('interval', 'register')),
  reporting_interval  interval         NOT NULL DEFAULT INTERVAL '60 seconds'
                      CHECK (reporting_interval > INTERVAL '0'),
  registered_at       timestamptz      NOT NULL DEFAULT now()
);

CREATE TABLE charging_assignment (
  assignment_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  meter_id       text COLLATE "C" NOT NULL REFERENCES meter,
  vehicle_id     text COLLATE "C" NOT NULL REFERENCES vehicle,
  during         tstzrange        NOT NULL
                 CHECK (NOT isempty(during) AND lower_inc(during) AND NOT upper_inc(during)),
  CONSTRAINT one_vehicle_at_a_meter EXCLUDE USING gist (meter_id WITH =, during WITH &&),
  CONSTRAINT one_meter_at_a_vehicle EXCLUDE USING gist (vehicle_id WITH =, during WITH &&)
);
