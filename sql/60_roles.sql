-- Two roles to grant from. They may log in once a DBA gives them a password (on the embedded engine
-- they may at once). Roles belong to the whole cluster, so they are made only where missing.
DO $$
DECLARE
  wanted name;
BEGIN
  FOREACH wanted IN ARRAY ARRAY['energy_reader', 'energy_ingest'] LOOP
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
      BEGIN
        EXECUTE format('CREATE ROLE %I LOGIN', wanted);
      EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;  -- made meanwhile by the migrate of another database: no lock spans two databases
      END;
    END IF;
  END LOOP;
END $$;

-- Nothing by default: a function is otherwise open to everyone. No temporary tables either: on the
-- embedded engine they would be there for every session, in front of ours.
DO $$ BEGIN
  EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC, energy_reader, energy_ingest',
                 current_database());
END $$;
REVOKE ALL ON ALL TABLES IN SCHEMA public FROM energy_reader, energy_ingest;
DO $$
DECLARE
  own regprocedure;
BEGIN
  FOR own IN
    SELECT p.oid FROM pg_proc p
    WHERE p.pronamespace = 'public'::regnamespace
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
  LOOP
    EXECUTE format('REVOKE ALL ON ROUTINE %s FROM PUBLIC, energy_reader, energy_ingest', own);
  END LOOP;
END $$;

-- The reader: the documented names, and no other.
GRANT USAGE ON SCHEMA public TO energy_reader, energy_ingest;
GRANT SELECT ON
  meter_telemetry_history, vehicle_telemetry_history, meter_live_status, vehicle_live_status,
  meter_hourly, vehicle_hourly, meter_daily, vehicle_daily,
  meter_energy_hourly_v1, vehicle_energy_hourly_v1, meter_energy_daily_v1, vehicle_energy_daily_v1,
  charging_session_v1, correction, corrected_meter_reading, corrected_vehicle_reading, suspect_reading,
  plausibility_limit
TO energy_reader;
GRANT EXECUTE ON FUNCTION
  vehicle_performance_v1(text, timestamptz, timestamptz),
  vehicle_performance_series_v1(text, timestamptz, timestamptz, interval, text),
  fleet_performance_v1(timestamptz, timestamptz),
  charging_session_v1(text, timestamptz, timestamptz)
TO energy_reader;
-- Real-time aggregates and the energy views evaluate these with the rights of the one who asks.
GRANT EXECUTE ON FUNCTION
  register_step(float8, float8), counter_increase_next(float8[], float8),
  counter_increase_total(float8[]), counter_increase(float8),
  bucket_increase_next(float8[], float8, float8, float8), bucket_increase(float8, float8, float8)
TO energy_reader, energy_ingest;

-- Ingest: adds to history, moves live rows forward, registers devices, quarantines. History is
-- append only, so there is no UPDATE and no DELETE on it.
GRANT SELECT, INSERT ON meter_telemetry_history, vehicle_telemetry_history TO energy_ingest;
GRANT SELECT, INSERT, UPDATE ON meter_live_status, vehicle_live_status, quarantine TO energy_ingest;
GRANT SELECT, INSERT ON meter, vehicle TO energy_ingest;
GRANT SELECT ON charging_assignment TO energy_ingest;
GRANT SELECT ON corrected_meter_reading, corrected_vehicle_reading, plausibility_limit TO energy_ingest;
GRANT EXECUTE ON FUNCTION
  record_meter_readings(text[], timestamptz[], float8[], float8[], timestamptz),
  record_vehicle_readings(text[], timestamptz[], float8[], float8[], float8[], timestamptz),
  judge_recorded(text, text[], timestamptz[], bigint[], bigint[]),
  judge_inserted(text, text[], timestamptz[]),
  implausible_beyond_limits(text, text[], timestamptz[]), readings_to_judge(
    text, text, timestamptz, timestamptz),
  reading_before(text, text, timestamptz), declared_device(text, text),
  implausibilities(
    judged_reading, judged_reading, text, interval, float8, float8, float8, float8),
  is_energy_plausible(float8, float8, interval, text, interval, float8, float8),
  plausible_kwh(float8, interval, interval), plausible_change(float8, interval),
  clock_hours_behind(timestamptz, timestamptz, timestamptz, timestamptz)
TO energy_ingest;
