-- depends: 0012_charging_session

-- What migrate left behind, object by object, so that a change by hand can be told and named.
CREATE TABLE schema_fingerprint (
  kind        text COLLATE "C" NOT NULL,
  name        text COLLATE "C" NOT NULL,
  definition  text             NOT NULL,
  PRIMARY KEY (kind, name)
);

-- The releases (migrations/ and sql/) that were applied here. A service is ready where its own is
-- among them, so that an older one goes on while a newer one is rolled out.
CREATE TABLE schema_release (
  checksum     text COLLATE "C" PRIMARY KEY,
  printed_by   text             NOT NULL,
  migrated_at  timestamptz
);
