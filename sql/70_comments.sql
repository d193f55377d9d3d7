-- What everything is, for psql's \d+ and \df+. A column's name means the same wherever it stands, so
-- columns are told by name, and only an exception by relation.

COMMENT ON TABLE meter_telemetry_history IS
  'Every reading of every smart meter, append only: a hypertable by ts, the columnstore after 3 days, dropped after 400 (settings). Late rows are accepted.';
COMMENT ON TABLE vehicle_telemetry_history IS
  'Every reading of every vehicle, append only: a hypertable by ts, the columnstore after 3 days, dropped after 400 (settings). Late rows are accepted.';
COMMENT ON TABLE meter_live_status IS
  'One row a meter: its newest reading by its own clock. A late reading never replaces a newer one.';
COMMENT ON TABLE vehicle_live_status IS
  'One row a vehicle: its newest reading by its own clock. A late reading never replaces a newer one.';
COMMENT ON TABLE meter IS
  'The meters that were declared, assigned or heard, and how their kWh are meant. A change holds for the whole past, at once.';
COMMENT ON TABLE vehicle IS
  'The vehicles that were declared, assigned or heard, and how their kWh are meant. A change holds for the whole past, at once.';
COMMENT ON TABLE charging_assignment IS
  'The ledger of which meter fed which vehicle when. A meter feeds one vehicle at a time, and a vehicle hangs on one meter at a time; touching ends do not overlap.';
COMMENT ON TABLE quarantine IS
  'What was not a reading, as it came: once for each sender, reason and bytes, with a count. Nothing here is ever in a figure.';
COMMENT ON TABLE api_key IS 'API keys of the HTTP service. The secret itself is not kept.';
COMMENT ON TABLE job_run IS
  'Jobs that the service ran itself, where the engine has no background workers. Kept for 90 days.';
COMMENT ON TABLE rollup_probe IS
  'Versions of TimescaleDB whose book-keeping migrate has probed: only a trusted one is answered from rollups.';
COMMENT ON TABLE schema_fingerprint IS
  'What migrate left, object by object: energy-platform doctor names what was changed by hand since.';
COMMENT ON TABLE schema_release IS
  'The releases of migrations and sql that were applied to this database.';

COMMENT ON VIEW meter_hourly IS
  'Real-time continuous aggregate: a meter''s UTC hours. Late data shows after the next refresh.';
COMMENT ON VIEW vehicle_hourly IS
  'Real-time continuous aggregate: a vehicle''s UTC hours. Late data shows after the next refresh.';
COMMENT ON VIEW meter_daily IS
  'Real-time continuous aggregate on meter_hourly: a meter''s UTC days. Kept for ever.';
COMMENT ON VIEW vehicle_daily IS
  'Real-time continuous aggregate on vehicle_hourly: a vehicle''s UTC days. Kept for ever.';
COMMENT ON VIEW meter_hourly_materialized IS
  'What meter_hourly has on disk, without its live part. For vehicle_performance_v1().';
COMMENT ON VIEW vehicle_hourly_materialized IS
  'What vehicle_hourly has on disk, without its live part. For vehicle_performance_v1().';
COMMENT ON VIEW meter_daily_materialized IS 'What meter_daily has on disk, without its live part.';
COMMENT ON VIEW vehicle_daily_materialized IS 'What vehicle_daily has on disk, without its live part.';
COMMENT ON VIEW meter_energy_hourly_v1 IS
  'A meter''s energy by UTC hour, right for both kinds of device: the steps between hours are in it.';
COMMENT ON VIEW vehicle_energy_hourly_v1 IS
  'A vehicle''s energy and temperature by UTC hour, right for both kinds of device.';
COMMENT ON VIEW meter_energy_daily_v1 IS
  'A meter''s energy by UTC day, right for both kinds of device: the steps between days are in it.';
COMMENT ON VIEW vehicle_energy_daily_v1 IS
  'A vehicle''s energy and temperature by UTC day, right for both kinds of device.';
COMMENT ON VIEW charging_session_v1 IS
  'Charging sessions of all vehicles that ended in the last 31 days. Name a vehicle in WHERE: each costs a call of the function.';
COMMENT ON VIEW job_status IS
  'Policies and jobs with their last run, whether TimescaleDB''s workers ran it or the service did.';

COMMENT ON TABLE correction IS
  'What an administrator has voided or replaced, with the reason. History holds what is valid.';
COMMENT ON TABLE corrected_meter_reading IS
  'Readings of meters as they were before a correction took them out of history. Sent again, they are duplicates.';
COMMENT ON TABLE corrected_vehicle_reading IS
  'Readings of vehicles as they were before a correction took them out of history. Sent again, they are duplicates.';
COMMENT ON TABLE plausibility_limit IS
  'What a device can do, by class: over a hard limit a reading is not taken, over a soft one it is flagged. NULL: no such limit.';
COMMENT ON TABLE suspect_reading IS
  'Readings of history that are not plausible after the reading before them, each with the reason. They are in every figure.';

COMMENT ON TYPE judged_reading IS 'A reading of either class, as it is judged. Internal.';
COMMENT ON TYPE judged_run IS 'Readings of one device that follow upon each other, as they are judged. Internal.';
COMMENT ON TYPE piece_measures IS 'What one device measured in a piece of time. Internal.';
COMMENT ON TYPE charging_session IS 'The row of charging_session_v1().';
COMMENT ON TYPE vehicle_performance IS
  'The row of vehicle_performance_v1() and fleet_performance_v1(): the answer''s names in snake_case.';

DO $$
DECLARE
  told record;
BEGIN
  FOR told IN
    WITH meaning (relation, name, text) AS (VALUES
      (NULL, 'meter_id', 'The meter: 1 to 64 printable ASCII characters.'),
      (NULL, 'vehicle_id', 'The vehicle: 1 to 64 printable ASCII characters.'),
      (NULL, 'ts', 'When the device read: it speaks of the time since its previous reading.'),
      (NULL, 'received_at', 'When the service took the reading.'),
      (NULL, 'kwh_consumed_ac', 'kWh of AC: since the reading before (interval), or a counter (register).'),
      (NULL, 'kwh_delivered_dc', 'kWh of DC into the battery: since the reading before (interval), or a counter (register).'),
      (NULL, 'voltage', 'Volt, at the meter.'),
      (NULL, 'soc', 'State of charge of the battery, percent.'),
      (NULL, 'battery_temp', 'Temperature of the battery, degrees Celsius.'),
      (NULL, 'energy_kind', 'interval: each kWh is what flowed since the reading before. register: a counter that only grows; a fall is a reset.'),
      (NULL, 'reporting_interval', 'How often the device promises a reading: what coverage is measured by.'),
      (NULL, 'registered_at', 'When the device was first declared, assigned or heard.'),
      (NULL, 'assignment_id', 'Number of the assignment, as in the API.'),
      (NULL, 'during', 'Since when and until when (exclusive) the meter fed the vehicle; no upper end: until further notice.'),
      (NULL, 'quarantine_id', 'Number of the entry, as in the API.'),
      (NULL, 'fingerprint', 'SHA-256 of sender, reason and bytes: the same again only counts.'),
      (NULL, 'payload', 'The bytes as they came, up to 64 KiB.'),
      (NULL, 'payload_bytes', 'Bytes that came, also where only the first 64 KiB are kept.'),
      (NULL, 'code', 'Stable slug of the reason.'),
      (NULL, 'path', 'The field that was wrong, as a JSON path.'),
      (NULL, 'detail', 'The reason in words.'),
      (NULL, 'device_id', 'The meter or vehicle that the payload names, where it can be told.'),
      (NULL, 'key_id', 'The API key, without its secret.'),
      (NULL, 'count', 'How many times it came.'),
      (NULL, 'first_seen', 'When it came first.'),
      (NULL, 'last_seen', 'When it came last: retention counts from here.'),
      (NULL, 'secret_sha256', 'SHA-256 of the key''s secret, which is 32 random bytes.'),
      (NULL, 'name', 'What the key is for.'),
      (NULL, 'scopes', 'What the key may do: ingest, read, admin.'),
      (NULL, 'device_ids', 'The only devices that the key may speak for; NULL: no such limit.'),
      (NULL, 'device_prefix', 'The key may speak only for devices whose id begins so; NULL: no such limit.'),
      (NULL, 'created_at', 'When the key was made.'),
      (NULL, 'revoked_at', 'When the key was revoked; NULL: it is valid.'),
      (NULL, 'job_run_id', 'Number of the run.'),
      (NULL, 'job_id', 'TimescaleDB''s number of the job.'),
      (NULL, 'job_name', 'The job and what it works on.'),
      (NULL, 'job', 'The policy''s or job''s procedure.'),
      (NULL, 'relation', 'The table or aggregate that the job works on; NULL: none.'),
      (NULL, 'schedule_interval', 'How often the job runs.'),
      (NULL, 'scheduled', 'Whether the job runs at all: retention is held by hold_retention().'),
      (NULL, 'started_at', 'When the run began.'),
      (NULL, 'finished_at', 'When the run ended.'),
      (NULL, 'succeeded', 'Whether the run went well.'),
      (NULL, 'error', 'What went wrong; NULL: nothing.'),
      (NULL, 'last_started', 'When the last run began; NULL: it has never run.'),
      (NULL, 'last_succeeded', 'When a run last ended well; NULL: never.'),
      (NULL, 'last_ok', 'Whether the last run went well; NULL: never run, or running now.'),
      (NULL, 'last_error', 'What went wrong in the last run.'),
      (NULL, 'timescaledb_version', 'Version of the extension.'),
      (NULL, 'trusted', 'Whether a late row was marked, and only its hour, until it was refreshed.'),
      (NULL, 'probed_at', 'When the probe ran.'),
      (NULL, 'kind', 'Kind of object: table, column, index, function, comment, grant ...'),
      (NULL, 'definition', 'The statement that makes the object, or what it is like.'),
      (NULL, 'checksum', 'SHA-256 over the files of the release.'),
      (NULL, 'printed_by', 'Versions of PostgreSQL and TimescaleDB and of the query that printed the definitions.'),
      (NULL, 'migrated_at', 'When its migrate ended; NULL: it was cut off.'),
      (NULL, 'hour', 'Begin of the hour, UTC.'),
      (NULL, 'day', 'Begin of the day, UTC.'),
      (NULL, 'readings', 'How many readings.'),
      (NULL, 'kwh_sum', 'Sum of the readings'' kWh: the energy, for a device of kind interval.'),
      (NULL, 'kwh_increase', 'kWh that a register grew by inside the bucket, resets allowed for; the step into the bucket is not in it.'),
      (NULL, 'kwh_first', 'kWh of the first reading.'),
      (NULL, 'ts_first', 'Time of the first reading.'),
      (NULL, 'kwh_last', 'kWh of the last reading.'),
      (NULL, 'ts_last', 'Time of the last reading.'),
      (NULL, 'battery_temp_sum', 'Sum of the battery temperatures, degrees Celsius: over readings it is their mean.'),
      (NULL, 'battery_temp_min', 'Lowest battery temperature, degrees Celsius.'),
      (NULL, 'battery_temp_max', 'Highest battery temperature, degrees Celsius.'),
      (NULL, 'battery_temp_average', 'Mean battery temperature of the readings, degrees Celsius.'),
      (NULL, 'kwh', 'Energy in kWh, of either kind of device.'),
      (NULL, 'temp_sum', 'Sum of the battery temperatures, degrees Celsius; 0 for a meter.'),
      (NULL, 'since', 'Begin of the window, inclusive.'),
      (NULL, 'until', 'End of the window, exclusive.'),
      (NULL, 'total_kwh_consumed_ac', 'kWh of AC of the meters that fed the vehicle, each only while it did; NULL: none was assigned.'),
      (NULL, 'total_kwh_delivered_dc', 'kWh of DC that the vehicle took, metered or not.'),
      (NULL, 'efficiency_ratio', 'Metered DC over AC, 1 is no loss; NULL: AC is 0 or unknown.'),
      (NULL, 'average_battery_temp', 'Mean of the window''s readings, degrees Celsius; NULL: none.'),
      (NULL, 'metered_kwh_delivered_dc', 'kWh of DC while a meter was assigned.'),
      (NULL, 'ac_readings', 'Readings of the assigned meters, each while it was assigned.'),
      (NULL, 'dc_readings', 'Readings of the vehicle.'),
      (NULL, 'ac_coverage', 'ac_readings over what the meters'' reporting intervals promise while assigned, 0 to 1.'),
      (NULL, 'dc_coverage', 'dc_readings over what the vehicle''s reporting interval promises, 0 to 1.'),
      (NULL, 'suspect_readings', 'Readings among those of the vehicle and of its meters that are flagged as not plausible.'),
      (NULL, 'correction_id', 'Number of the correction, as in the API.'),
      (NULL, 'device_class', 'meter or vehicle.'),
      (NULL, 'action', 'void: readings were taken out. replace: others were put in their place.'),
      (NULL, 'reason', 'Why, in the words of who did it.'),
      (NULL, 'made_by', 'Who did it: the API key, or the user of the command line.'),
      (NULL, 'made_at', 'When it was done.'),
      (NULL, 'voided', 'How many readings were taken out of history.'),
      (NULL, 'stored', 'How many readings were put into history.'),
      ('correction', 'during', 'The piece of time whose readings were corrected.'),
      (NULL, 'previous_ts', 'When the device read before its newest reading, as far as it came before that.'),
      (NULL, 'previous_kwh_consumed_ac', 'kWh of the reading before.'),
      (NULL, 'previous_soc', 'State of charge of the reading before, %.'),
      (NULL, 'previous_kwh_delivered_dc', 'kWh of the reading before.'),
      (NULL, 'previous_battery_temp', 'Battery temperature of the reading before, degrees Celsius.'),
      (NULL, 'previous_received_at', 'When the reading before arrived here.'),
      (NULL, 'suspect_id', 'Number of the flag; judged again, a reading gets a new one.'),
      (NULL, 'power_kw_soft', 'kW over which a reading is flagged.'),
      (NULL, 'power_kw_hard', 'kW over which a reading is not taken.'),
      (NULL, 'step_kwh_soft', 'kWh over which the step of a register is flagged.'),
      (NULL, 'step_kwh_hard', 'kWh over which the step of a register is not taken.'),
      (NULL, 'temp_rate_soft', 'Degrees Celsius a minute over which a reading is flagged.'),
      (NULL, 'temp_rate_hard', 'Degrees Celsius a minute over which a reading is not taken.'),
      (NULL, 'soc_rate_soft', 'Percent of charge a minute over which a reading is flagged.'),
      (NULL, 'soc_rate_hard', 'Percent of charge a minute over which a reading is not taken.'),
      ('suspect_reading', 'code', 'What is not plausible: power, unit_mixup, register_step, temperature_rate, soc_rate, clock_offset.'),
      ('suspect_reading', 'detail', 'The same in words, with figures.'),
      ('judged_reading', 'temp', 'Battery temperature, degrees Celsius; NULL for a meter.'),
      ('judged_run', 'device', 'The id of the device.'),
      ('judged_run', 'since', 'The first reading of the run.'),
      ('judged_run', 'until', 'The last reading of the run.'),
      ('judged_run', 'previous_ts', 'The reading before the run.'),
      ('judged_run', 'last_ts', 'The reading after the run, or its last: what is to be judged ends there.'),
      (NULL, 'verdict', 'The first that applies: no_meter, insufficient_data (a coverage under 0.9), above_one, below_threshold (ratio under 0.85), ok.'),
      ('schema_fingerprint', 'name', 'Name of the object; of a part, behind that of its table.'),
      (NULL, 'ended_at', 'The last reading with energy.'),
      (NULL, 'soc_start', 'State of charge at started_at, percent: of the reading at that instant, else of the first in the session.'),
      (NULL, 'soc_end', 'State of charge at ended_at, percent.'),
      (NULL, 'is_open', 'The session may go on: its assignment does, and neither readings nor silence say that it has ended.'),
      ('charging_session', 'started_at', 'The reading before the first with energy; that one itself, where the one before is too long ago.'),
      ('charging_session_v1', 'started_at', 'The reading before the first with energy; that one itself, where the one before is too long ago.'),
      ('meter_live_status', 'ts', 'When the meter read last, by its own clock.'),
      ('vehicle_live_status', 'ts', 'When the vehicle read last, by its own clock.')
    )
    SELECT DISTINCT ON (c.oid, a.attnum) c.relname, a.attname, m.text
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN meaning m ON m.name = a.attname AND (m.relation IS NULL OR m.relation = c.relname)
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v', 'c')
      AND c.relname NOT LIKE '%yoyo%'
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
    ORDER BY c.oid, a.attnum, m.relation NULLS LAST
  LOOP
    EXECUTE format('COMMENT ON COLUMN public.%I.%I IS %L', told.relname, told.attname, told.text);
  END LOOP;
END $$;

COMMENT ON FUNCTION float_ratio(float8, float8) IS
  'A quotient of two figures that are not negative; NULL where a float8 cannot hold it.';
COMMENT ON FUNCTION check_window(timestamptz, timestamptz) IS
  'Raises invalid_parameter_value unless since is before until and both are instants.';
COMMENT ON FUNCTION reading_coverage(float8, float8) IS
  'Readings over what reporting intervals promise, at most 1; 0 where nothing was promised.';
COMMENT ON FUNCTION performance_verdict(float8, float8, float8, float8, float8) IS
  'The verdict on AC, metered DC (kWh), their ratio and both coverages: the first that applies.';
COMMENT ON FUNCTION fleet_performance_v1(timestamptz, timestamptz) IS
  'The row of vehicle_performance_v1() for every known vehicle, in no order: the same figures, for the whole fleet at once. SQLSTATE ENR01 where an edge cuts an hour of any of them whose raw rows are gone.';
COMMENT ON FUNCTION fleet_measures(
  text, text[], text[], timestamptz[], timestamptz[], timestamptz, timestamptz) IS
  'device_measures() for many pieces at once: a row for each that has readings, by its number in the arrays.';
COMMENT ON FUNCTION fleet_parts(
  text, text[], boolean[], timestamptz[], timestamptz[], tstzmultirange, tstzmultirange) IS
  'What pieces of devices measured, rolled-up and raw parts apart.';
COMMENT ON FUNCTION fleet_before(text, text, timestamptz, tstzmultirange) IS
  'register_before(), where the hour before is known to hold nothing: from the rollup if it can be told.';
COMMENT ON FUNCTION pieces_within(
  text[], boolean[], timestamptz[], timestamptz[], timestamptz, timestamptz, boolean) IS
  'Pieces of devices as far as they lie in a stretch of time, and which whole hours of each are read from the rollup.';
COMMENT ON FUNCTION charging_session_v1(text, timestamptz, timestamptz) IS
  'The charging sessions of a vehicle that end in since <= ended_at < until, each whole, with the figures of vehicle_performance_v1(). SQLSTATE ENR01 where the raw readings that they are found in are gone.';
COMMENT ON FUNCTION piece_sessions(text, text, interval, timestamptz, timestamptz) IS
  'When a vehicle charged in a piece of time with one meter, or with none.';
COMMENT ON FUNCTION sessions_seen_since(text, text, interval, timestamptz, timestamptz) IS
  'From where on readings have to be looked at to see a session that runs at an instant from its beginning.';
COMMENT ON FUNCTION vehicle_performances(text, timestamptz[], timestamptz) IS
  'vehicle_performance_v1() of consecutive windows.';
COMMENT ON FUNCTION measure_vehicle(
  text, text, float8, timestamptz, timestamptz, tstzmultirange, tstzmultirange, tstzmultirange,
  tstzmultirange) IS
  'The performance of a vehicle in one window, from the hours of the rollups that may be read.';
COMMENT ON FUNCTION vehicle_performance_series_v1(
  text, timestamptz, timestamptz, interval, text) IS
  'vehicle_performance_v1() for each hour or day of the window, by the clocks of a time zone.';
COMMENT ON FUNCTION local_edges(timestamptz, timestamptz, interval, text) IS
  'Where a window begins, and where local hours or days begin in it.';
COMMENT ON FUNCTION vehicle_performance_v1(text, timestamptz, timestamptz) IS
  'What a vehicle took and what its meters gave in since <= ts < until, exact over all committed rows at once. One row; none for an unknown vehicle. kWh, degrees Celsius. SQLSTATE ENR01 where an edge cuts an hour whose raw rows are gone; its DETAIL is the oldest instant that can be cut.';
COMMENT ON FUNCTION assigned_pieces(text, timestamptz, timestamptz) IS
  'The window of a vehicle, cut where its assignments begin and end; meter_id is NULL where it hung on none.';
COMMENT ON FUNCTION device_measures(
  text, text, text, timestamptz, timestamptz, tstzmultirange, tstzmultirange) IS
  'Energy (kWh), readings and temperature sum of one device in a window: rolled-up hours from the rollup, the rest from raw rows.';
COMMENT ON FUNCTION raw_measures(text, text, text, timestamptz, timestamptz) IS
  'What one device measured in a piece of time, from the raw rows.';
COMMENT ON FUNCTION rolled_measures(text, text, text, timestamptz, timestamptz) IS
  'What one device measured in a piece of time, from whole rolled-up hours.';
COMMENT ON FUNCTION register_before(text, text, timestamptz) IS
  'kWh of a device''s last reading before an instant, however long ago; NULL: there is none.';
COMMENT ON FUNCTION register_long_before(text, text, timestamptz, timestamptz) IS
  'register_before(), where the raw rows down to an instant are known to hold none.';
COMMENT ON FUNCTION raw_before(text, text, timestamptz, timestamptz) IS
  'kWh of a device''s last raw reading in a piece of time; NULL: there is none.';
COMMENT ON FUNCTION check_edge(text, text, timestamptz, tstzmultirange) IS
  'Raises ENR01 where an instant cuts an hour whose raw rows are gone and in which the device has readings.';
COMMENT ON FUNCTION oldest_cut() IS
  'The oldest instant at which a window may begin or end inside an hour, for any vehicle.';
COMMENT ON FUNCTION whole_hours(tstzmultirange) IS 'What of a multirange is whole UTC hours.';
COMMENT ON FUNCTION rollup_coverage(name, name, timestamptz, timestamptz) IS
  'rolled: which whole hours of a window the rollup answers rightly, in this snapshot. dropped: where no raw chunk is.';
COMMENT ON FUNCTION rollup_dirty_hours(name, timestamptz, timestamptz) IS
  'The whole hours that a rollup does not, or not rightly, hold. All of them where the books cannot be read.';
COMMENT ON FUNCTION rollup_dirty_ranges(name, timestamptz, timestamptz) IS
  'The ranges that TimescaleDB''s own books hold to be not, or not rightly, rolled up; bounds inclusive.';
COMMENT ON FUNCTION raw_chunk_ranges(name, timestamptz, timestamptz) IS
  'Where in a window a hypertable has chunks.';
COMMENT ON FUNCTION raw_store_version() IS
  'A number that is another once a raw chunk is compressed, recompressed, decompressed or dropped.';
COMMENT ON FUNCTION raw_store_version(timestamptz, timestamptz) IS
  'The same of the raw chunks between two instants.';
COMMENT ON FUNCTION check_raw_store(bigint, timestamptz, timestamptz) IS
  'Raises serialization_failure where raw chunks were compressed or dropped since the calling statement began.';

COMMENT ON FUNCTION register_step(float8, float8) IS
  'kWh that a register grew by from one reading to the next. A fall is a reset: the step is what it shows after it. A first reading adds nothing.';
COMMENT ON FUNCTION counter_increase_next(float8[], float8) IS 'State of counter_increase(): last value, total kWh.';
COMMENT ON FUNCTION counter_increase_total(float8[]) IS 'Result of counter_increase() and bucket_increase().';
COMMENT ON AGGREGATE counter_increase(float8) IS
  'kWh that a register grew by over readings ORDER BY ts, resets allowed for.';
COMMENT ON FUNCTION bucket_increase_next(float8[], float8, float8, float8) IS
  'State of bucket_increase(): last value, total kWh.';
COMMENT ON AGGREGATE bucket_increase(float8, float8, float8) IS
  'kWh that a register grew by over buckets (increase, first, last) ORDER BY time: their increases and the steps between them.';

COMMENT ON FUNCTION reconcile_policies(
  interval, interval, interval, interval, interval, interval, interval, interval, bigint) IS
  'Make all policies be as the settings say; what is so already is left alone.';
COMMENT ON FUNCTION wanted_policies(
  interval, interval, interval, interval, interval, interval, interval, bigint) IS
  'Every policy and job that the settings ask for.';
COMMENT ON FUNCTION reconcile_policy(regclass, text, jsonb, interval) IS
  'Make the policy of one kind on one relation be exactly this.';
COMMENT ON FUNCTION hypertable_number(regclass) IS
  'The number by which jobs know a hypertable or the materialization of an aggregate.';
COMMENT ON PROCEDURE hold_retention(integer, jsonb) IS
  'Job: retention is scheduled only while every refresh goes well, on time, and all that would be dropped is rolled up.';
COMMENT ON FUNCTION unrolled_hours(text, timestamptz) IS
  'How many hours of devices of a class before an instant the hourly rollup lacks, or holds otherwise than raw readings say.';
COMMENT ON FUNCTION is_close(float8, float8) IS
  'Whether two sums are the same but for the order in which they were added up.';
COMMENT ON PROCEDURE sweep_expired(integer, jsonb) IS
  'Job: delete quarantine past its retention or over its bound, and records of job runs older than 90 days.';

COMMENT ON FUNCTION rolled_before(text, text, timestamptz, timestamptz) IS
  'The newest hour of a device''s rollup before an instant, and its last kWh.';
COMMENT ON FUNCTION raw_dirty_hours(text, timestamptz, timestamptz) IS
  'The hours between two instants that have raw rows and that the rollup does not, or not rightly, hold.';
COMMENT ON FUNCTION record_meter_readings(text[], timestamptz[], float8[], float8[], timestamptz) IS
  'For the writer: store readings of meters; the positions of those that were known already.';
COMMENT ON FUNCTION
  record_vehicle_readings(text[], timestamptz[], float8[], float8[], float8[], timestamptz) IS
  'For the writer: store readings of vehicles; the positions of those that were known already.';
COMMENT ON FUNCTION judge_recorded(text, text[], timestamptz[], bigint[], bigint[]) IS
  'For record_*_readings(): flag what is suspect, or raise EP001 where a hard limit is broken.';
COMMENT ON FUNCTION is_energy_plausible(float8, float8, interval, text, interval, float8, float8) IS
  'Whether a reading need not be looked at closely: the energy may follow upon that before.';
COMMENT ON FUNCTION plausible_kwh(float8, interval, interval) IS
  'kWh that may have flowed between two readings at a power in kW.';
COMMENT ON FUNCTION plausible_change(float8, interval) IS
  'What may have changed between two readings at a rate per minute.';
COMMENT ON FUNCTION clock_hours_behind(timestamptz, timestamptz, timestamptz, timestamptz) IS
  'By how many whole hours a device''s clock is behind ours; NULL: it is not.';
COMMENT ON FUNCTION implausibilities(
  judged_reading, judged_reading, text, interval, float8, float8, float8, float8) IS
  'What is not plausible in a reading, as seen from the one before it: code and detail.';
COMMENT ON FUNCTION readings_to_judge(text, text, timestamptz, timestamptz) IS
  'The readings of one device between two instants, both inclusive.';
COMMENT ON FUNCTION reading_before(text, text, timestamptz) IS
  'The last reading of one device before an instant, at most ten days before.';
COMMENT ON FUNCTION next_reading_ts(text, text, timestamptz) IS
  'When one device read next after an instant, at most ten days after.';
COMMENT ON FUNCTION judge_range(text, text, timestamptz, timestamptz) IS
  'Flag anew what is suspect in one device''s readings between two instants, and in the one after.';
COMMENT ON FUNCTION declared_device(text, text) IS 'Energy kind and reporting interval of a device.';
COMMENT ON FUNCTION last_dropped_hour(text, text) IS
  'The last hour of a device that is rolled up and has no raw rows any more.';
COMMENT ON FUNCTION judge_inserted(text, text[], timestamptz[]) IS
  'For the writer: flag what is suspect among readings just inserted.';
COMMENT ON FUNCTION judge_runs(text, judged_run[]) IS
  'judge_range() of many runs at once, where the readings around them are near; returns the others.';
COMMENT ON FUNCTION implausible_beyond_limits(text, text[], timestamptz[]) IS
  'Which of some readings in history break a hard limit, with code and detail.';
COMMENT ON FUNCTION hold_device(text, text) IS
  'Hold off ingest of one device until the transaction ends.';
COMMENT ON FUNCTION hold_ingest(text) IS
  'Hold off ingest of a class until the transaction ends.';
COMMENT ON FUNCTION reset_live(text, text, timestamptz) IS
  'Make the live row of a device be its newest reading, after readings up to an instant have changed.';
COMMENT ON FUNCTION suspect_count(text, text, timestamptz, timestamptz) IS
  'How many of a device''s readings in a window are flagged.';

COMMENT ON ROLE energy_reader IS 'May read the documented names of energy-platform; for analysts and Grafana.';
COMMENT ON ROLE energy_ingest IS 'May add readings to energy-platform; may not change history.';
