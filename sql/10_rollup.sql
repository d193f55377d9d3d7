-- Which whole hours of a window may be answered from the rollup, in the caller's own snapshot.

-- The materialization itself, without the live branch of a real-time aggregate. Its table's name is
-- given by TimescaleDB, so these views are made again by every migrate.
DO $$
DECLARE
  aggregate record;
BEGIN
  FOR aggregate IN
    SELECT view_name, materialization_hypertable_schema AS schema,
           materialization_hypertable_name AS name
    FROM timescaledb_information.continuous_aggregates
    WHERE view_schema = 'public'
      AND view_name IN ('meter_hourly', 'vehicle_hourly', 'meter_daily', 'vehicle_daily')
  LOOP
    EXECUTE format('CREATE OR REPLACE VIEW public.%I AS SELECT * FROM %I.%I',
                   aggregate.view_name || '_materialized', aggregate.schema, aggregate.name);
  END LOOP;
END $$;

-- The ranges that TimescaleDB's own book-keeping holds to be not, or not correctly, rolled up:
-- three logs, which together are a superset of what a refresh in flight still owes, and all from
-- the watermark on. Bounds are inclusive. This is the only function that reads these tables; where the
-- rollup is not known to them, everything is dirty.
CREATE OR REPLACE FUNCTION rollup_dirty_ranges(rollup name, since timestamptz, until timestamptz)
RETURNS TABLE (lowest timestamptz, highest timestamptz)
LANGUAGE sql STABLE AS $$
  WITH aggregate AS (
    SELECT a.mat_hypertable_id, a.raw_hypertable_id, b.lo, b.hi
    FROM (VALUES (_timescaledb_functions.to_unix_microseconds(since),
                  _timescaledb_functions.to_unix_microseconds(until))) AS b (lo, hi)
    LEFT JOIN _timescaledb_catalog.continuous_agg a
      ON a.user_view_schema = 'public' AND a.user_view_name = rollup
  ), dirty AS (
    SELECT lo, hi, coalesce(watermark, lo) AS lowest, hi AS highest
    FROM aggregate LEFT JOIN _timescaledb_catalog.continuous_aggs_watermark
      USING (mat_hypertable_id)
    UNION ALL
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
  SELECT _timescaledb_functions.to_timestamp(greatest(dirty.lowest, lo)),
         _timescaledb_functions.to_timestamp(least(dirty.highest, hi))
  FROM dirty
  WHERE dirty.lowest <= hi AND dirty.highest >= lo
$$;

-- The whole hours, in and around since .. until, that only raw rows can answer. Where a version of
-- TimescaleDB keeps its books elsewhere, that is every hour: slower, never wrong.
CREATE OR REPLACE FUNCTION rollup_dirty_hours(rollup name, since timestamptz, until timestamptz)
RETURNS tstzmultirange
LANGUAGE plpgsql STABLE AS $$
DECLARE
  hour constant interval := INTERVAL '1 hour';
  dirty tstzmultirange;
BEGIN
  SELECT coalesce(range_agg(tstzrange(date_bin(hour, d.lowest, 'epoch'),
                                      date_bin(hour, d.highest, 'epoch') + hour)), '{}')
  INTO dirty
  FROM public.rollup_dirty_ranges(rollup, since, until) d;
  RETURN dirty;
EXCEPTION WHEN undefined_table OR undefined_column OR undefined_function THEN
  RETURN tstzmultirange(tstzrange(NULL, NULL));
END $$;

-- The ranges that raw chunks exist for. A chunk's bounds are whole hours. The documented view says
-- the same as the catalog, but takes milliseconds.
CREATE OR REPLACE FUNCTION raw_chunk_ranges(hypertable name, since timestamptz, until timestamptz)
RETURNS tstzmultirange
LANGUAGE plpgsql STABLE AS $$
DECLARE
  lo constant bigint := _timescaledb_functions.to_unix_microseconds(since);
  hi constant bigint := _timescaledb_functions.to_unix_microseconds(until);
  chunks tstzmultirange;
BEGIN
  SELECT coalesce(range_agg(tstzrange(
           _timescaledb_functions.to_timestamp(greatest(s.range_start, lo)),
           _timescaledb_functions.to_timestamp(least(s.range_end, hi)))), '{}')
  INTO chunks
  FROM _timescaledb_catalog.hypertable h
  JOIN _timescaledb_catalog.dimension d ON d.hypertable_id = h.id
  JOIN _timescaledb_catalog.dimension_slice s ON s.dimension_id = d.id
  WHERE h.schema_name = 'public' AND h.table_name = hypertable
    AND s.range_start < hi AND s.range_end > lo;
  RETURN chunks;
EXCEPTION WHEN undefined_table OR undefined_column OR undefined_function THEN
  SELECT coalesce(range_agg(tstzrange(greatest(c.range_start, since),
                                      least(c.range_end, until))), '{}')
  INTO chunks
  FROM timescaledb_information.chunks c
  WHERE c.hypertable_schema = 'public' AND c.hypertable_name = hypertable
    AND c.range_start < until AND c.range_end > since;
  RETURN chunks;
END $$;

-- A number that is another once a raw chunk is compressed, recompressed, decompressed or dropped: it
-- is made of where the chunks' own rows in the books stand. A row that is written anew stands
-- elsewhere, because a snapshot still holds the old one in its place. Its status would not do: late
-- rows that wait make it "partial" again.
CREATE OR REPLACE FUNCTION raw_store_version() RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
BEGIN
  RETURN (SELECT coalesce(bit_xor(hashtidextended(c.ctid, c.id)), 0)
          FROM _timescaledb_catalog.hypertable h
          JOIN _timescaledb_catalog.chunk c ON c.hypertable_id = h.id
          WHERE h.schema_name = 'public'
            AND h.table_name IN ('meter_telemetry_history', 'vehicle_telemetry_history'));
EXCEPTION WHEN undefined_table OR undefined_column THEN
  RETURN 0;
END $$;

-- The same of the chunks between two instants only, however many others there are: what an answer has
-- not read from cannot have misled it.
CREATE OR REPLACE FUNCTION raw_store_version(since timestamptz, until timestamptz) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
DECLARE
  lo constant bigint := _timescaledb_functions.to_unix_microseconds(since);
  hi constant bigint := _timescaledb_functions.to_unix_microseconds(until);
BEGIN
  RETURN (SELECT coalesce(bit_xor(hashtidextended(c.ctid, c.id)), 0)
          FROM _timescaledb_catalog.hypertable h
          JOIN _timescaledb_catalog.dimension d ON d.hypertable_id = h.id
          JOIN _timescaledb_catalog.dimension_slice s ON s.dimension_id = d.id
          JOIN _timescaledb_catalog.chunk_constraint k ON k.dimension_slice_id = s.id
          JOIN _timescaledb_catalog.chunk c ON c.id = k.chunk_id
          WHERE h.schema_name = 'public'
            AND h.table_name IN ('meter_telemetry_history', 'vehicle_telemetry_history')
            AND s.range_start < hi AND s.range_end > lo);
EXCEPTION WHEN undefined_table OR undefined_column OR undefined_function THEN
  RETURN public.raw_store_version();
END $$;

-- An answer reads rows by the snapshot of its statement, but each of its parts is planned by how
-- chunks are stored at that moment. Rows that were moved or dropped in between are in neither place,
-- so the answer would lack them: it is refused, and to ask again is all that is needed. VOLATILE, so
-- that this looks at the chunks as they are now; the version is the caller's, so that of its snapshot.
CREATE OR REPLACE FUNCTION check_raw_store(
  version bigint, since timestamptz DEFAULT NULL, until timestamptz DEFAULT NULL) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  IF version <> (CASE WHEN since IS NULL THEN public.raw_store_version()
                      ELSE public.raw_store_version(since, until) END)
  THEN
    RAISE EXCEPTION USING
      ERRCODE = 'serialization_failure',
      MESSAGE = 'raw chunks were compressed or dropped while the answer was made',
      HINT = 'Ask again.';
  END IF;
END $$;
DROP FUNCTION IF EXISTS check_raw_store(bigint);

-- rolled: the whole hours of the window to be read from the rollup: those that are not dirty, and
--   those without a raw chunk.
-- dropped: where no raw chunk is, over the window widened to whole hours. The dirty log says
--   nothing there: dropping a chunk marks its range dirty, and no refresh may ever clear that.
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
BEGIN
  dropped := tstzmultirange(tstzrange(outer_lo, outer_hi))
             - public.raw_chunk_ranges(hypertable, outer_lo, outer_hi);
  IF inner_lo >= inner_hi THEN
    rolled := '{}';
    RETURN;
  END IF;
  whole := tstzmultirange(tstzrange(inner_lo, inner_hi));
  rolled := whole - public.rollup_dirty_hours(rollup, inner_lo, inner_hi) + whole * dropped;
END $$;
