-- depends: 0003_quarantine

-- What a register grew by. A fall is a reset, and what the counter shows after it is the step.
-- Continuous aggregates are built on these: they are never replaced; a new meaning is a new name.
-- A refresh runs with search_path = pg_catalog, so every name is qualified.

CREATE FUNCTION register_step(value float8, previous float8) RETURNS float8
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE WHEN previous IS NULL THEN 0.0
              WHEN value >= previous THEN value - previous
              ELSE value END
$$;

-- The state is {last value, total increase}.
CREATE FUNCTION counter_increase_next(state float8[], value float8) RETURNS float8[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE WHEN state IS NULL THEN ARRAY[value, 0.0]
              WHEN value >= state[1] THEN ARRAY[value, state[2] + (value - state[1])]
              ELSE ARRAY[value, state[2] + value] END
$$;

CREATE FUNCTION counter_increase_total(state float8[]) RETURNS float8
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT state[2]
$$;

CREATE AGGREGATE counter_increase(value float8) (
  SFUNC = public.counter_increase_next, STYPE = float8[],
  FINALFUNC = public.counter_increase_total, PARALLEL = SAFE
);

-- The same over buckets that are rolled up already: increases alone do not add up, because
-- the counter also steps from the last value of one bucket to the first of the next.
CREATE FUNCTION bucket_increase_next(state float8[], increase float8, first float8, last float8)
RETURNS float8[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT CASE WHEN state IS NULL THEN ARRAY[last, increase]
              WHEN first >= state[1] THEN ARRAY[last, state[2] + (first - state[1]) + increase]
              ELSE ARRAY[last, state[2] + first + increase] END
$$;

CREATE AGGREGATE bucket_increase(increase float8, first float8, last float8) (
  SFUNC = public.bucket_increase_next, STYPE = float8[],
  FINALFUNC = public.counter_increase_total, PARALLEL = SAFE
);
