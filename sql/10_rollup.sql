-- Which whole hours of a window may be answered from the rollup, in the caller's own snapshot.

-- The materialization itself, without the live branch of a real-time aggregate. Its table's name is
-- given by TimescaleDB, so these views are made again by every migrate.
DO $$
DECLARE
  aggregate record;
BEGIN
  FOR aggregate IN
    SELECT view_name, materialization_hypertable_schema AS schema, materialization_hypertable_name AS name
    FROM timescaledb_information.continuous_aggregates
    WHERE view_schema = 'public'
      AND view_name IN ('meter_hourly', 'vehicle_hourly', 'meter_daily', 'vehicle_daily')
  LOOP
    EXECUTE format('CREATE OR REPLACE VIEW public.%I AS SELECT * FROM %I.%I',
                   aggregate.view_name || '_materialized', aggregate.schema, aggregate.name);
  END LOOP;
END $$;

-- The ranges that TimescaleDB's own book-keeping holds to be not, or not correctly, rolled up.
-- Three tables together are a superset of what a refresh in flight still owes. Bounds are inclusive
-- and in microseconds. This is the only function that reads them.
CREATE OR REPLACE FUNCTION rollup_dirty_ranges(rollup name, since timestamptz, until timestamptz)
RETURNS TABLE (lowest timestamptz, highest timestamptz)
LANGUAGE sql STABLE AS $$
  WITH aggregate AS (
    SELECT mat_hypertable_id, raw_hypertable_id,
           _timescaledb_functions.to_unix_microseconds(since) AS lo,
           _timescaledb_functions.to_unix_microseconds(until) AS hi
    FROM _timescaledb_catalog.continuous_agg
    WHERE user_view_schema = 'public' AND user_view_name = rollup
  ), dirty AS (
    SELECT lo, hi, lowest_modified_value, greatest_modified_value
    FROM aggregate
    JOIN _timescaledb_catalog.continuous_aggs_hypertable_invalidation_log
      ON hypertable_id = raw_hypertable_id
    UNION ALL
    SELECT lo, hi, lowest_modified_value, greatest_modified_value
    FROM aggregate
    JOIN _timescaledb_catalog.continuous_aggs_materialization_invalidation_log
      ON materialization_id = mat_hypertable_id
    UNION ALL
    SELECT lo, hi, lowest_modified_value, greatest_modified_value
    FROM aggregate
    JOIN _timescaledb_catalog.continuous_aggs_materialization_ranges
      ON materialization_id = mat_hypertable_id
  )
  SELECT _timescaledb_functions.to_timestamp(greatest(lowest_modified_value, lo)),
         _timescaledb_functions.to_timestamp(least(greatest_modified_value, hi))
  FROM dirty
  WHERE lowest_modified_value <= hi AND greatest_modified_value >= lo
$$;

-- The ranges that raw chunks exist for. A chunk's bounds are whole hours.
CREATE OR REPLACE FUNCTION raw_chunk_ranges(hypertable name, since timestamptz, until timestamptz)
RETURNS tstzmultirange
LANGUAGE sql STABLE AS $$
  SELECT coalesce(range_agg(tstzrange(
           _timescaledb_functions.to_timestamp(greatest(
             s.range_start, _timescaledb_functions.to_unix_microseconds(since))),
           _timescaledb_functions.to_timestamp(least(
             s.range_end, _timescaledb_functions.to_unix_microseconds(until))))), '{}')
  FROM _timescaledb_catalog.hypertable h
  JOIN _timescaledb_catalog.dimension d ON d.hypertable_id = h.id
  JOIN _timescaledb_catalog.dimension_slice s ON s.dimension_id = d.id
  WHERE h.schema_name = 'public' AND h.table_name = hypertable
    AND s.range_start < _timescaledb_functions.to_unix_microseconds(until)
    AND s.range_end > _timescaledb_functions.to_unix_microseconds(since)
$$;

-- rolled: the whole hours of the window to be read from the rollup. They end at or before its
--   watermark and no dirty range touches them, or no raw chunk is there any more.
-- dropped: where no raw chunk is, over the window widened to whole hours. The dirty log says nothing
--   there: dropping a chunk marks its range dirty, and no refresh ever clears that.
CREATE OR REPLACE FUNCTION rollup_coverage(
  rollup name, hypertable name, since timestamptz, until timestamptz,
  OUT rolled tstzmultirange, OUT dropped tstzmultirange)
LANGUAGE plpgsql STABLE AS $$
DECLARE
  hour constant interval := INTERVAL '1 hour';
  epoch constant timestamptz := 'epoch';
  outer_lo timestamptz := date_bin(hour, since, epoch);
  outer_hi timestamptz := date_bin(hour, until - INTERVAL '1 microsecond', epoch) + hour;
  inner_lo timestamptz := CASE WHEN outer_lo = since THEN since ELSE outer_lo + hour END;
  inner_hi timestamptz := date_bin(hour, until, epoch);
  whole tstzmultirange;
  dirty tstzmultirange;
  watermark timestamptz;
BEGIN
  dropped := tstzmultirange(tstzrange(outer_lo, outer_hi))
             - public.raw_chunk_ranges(hypertable, outer_lo, outer_hi);
  IF inner_lo >= inner_hi THEN
    rolled := '{}';
    RETURN;
  END IF;
  whole := tstzmultirange(tstzrange(inner_lo, inner_hi));
  SELECT _timescaledb_functions.to_timestamp(w.watermark) INTO watermark
  FROM _timescaledb_catalog.continuous_agg a
  JOIN _timescaledb_catalog.continuous_aggs_watermark w USING (mat_hypertable_id)
  WHERE a.user_view_schema = 'public' AND a.user_view_name = rollup;
  SELECT coalesce(range_agg(tstzrange(date_bin(hour, d.lowest, epoch),
                                      date_bin(hour, d.highest, epoch) + hour)), '{}')
  INTO dirty
  FROM public.rollup_dirty_ranges(rollup, inner_lo, inner_hi) d;
  rolled := whole * tstzmultirange(tstzrange(NULL, watermark)) - dirty + whole * dropped;
END $$;
