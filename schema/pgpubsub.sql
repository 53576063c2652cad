-- pgpubsub.sql: the notification log.
--
-- NOTIFY forgets: who is away when a notification commits never hears of it.
-- What is published here is also kept, under a number, seq, so that a client
-- that comes back with its position gets all that it missed. Optional: pgpubsub
-- serves plain NOTIFY without any of this.
--
-- Load it, as often as you like, on PostgreSQL 13 or later, as any role that
-- may create a schema (it need not be a superuser; it will own the log). Loaded
-- over the log of an older version it keeps every notification. It waits for
-- transactions that are publishing, and those that come then wait for it:
--
--     psql -v ON_ERROR_STOP=1 -d DATABASE -f pgpubsub.sql
--
-- Nobody else may do anything then. For roles of your own, here `app` for what
-- writes to the database and `pgpubsub_server` for the role that pgpubsub
-- connects as:
--
--     grant usage on schema pgpubsub to app, pgpubsub_server;
--     grant execute on function
--         pgpubsub.publish(text, text, text), pgpubsub.publish(text, text, bigint),
--         pgpubsub.publish(text, json, text), pgpubsub.publish(text, json, bigint),
--         pgpubsub.publish(text, jsonb, text), pgpubsub.publish(text, jsonb, bigint),
--         pgpubsub.position(),
--         pgpubsub.notify_change()  -- to attach it to tables
--         to app;
--     grant select on pgpubsub.notification, pgpubsub.bounds to pgpubsub_server;
--
-- Publish what you like, in any transaction, or let a table do it:
--
--     select pgpubsub.publish('orders', '{"shipped": 7}', id => 42);
--
--     create trigger notify after insert or update or delete on orders
--         for each row execute function
--         pgpubsub.notify_change('orders', 'customer_id');
--
-- Get a state, and the position from which to follow what becomes of it, both
-- in one statement and so of one moment:
--
--     select pgpubsub.position(), (select json_agg(o) from orders o);
--
-- Keep a week of it, once an hour, from pg_cron or by such a line in a crontab,
-- which prints nothing that cron would mail:
--
--     0 * * * * psql -d DATABASE -qAtc "select pgpubsub.prune('7 days')" >/dev/null
--
-- A transaction that publishes cannot be prepared for two-phase commit, as
-- none can that has executed NOTIFY.

begin;

-- Loading it again need not tell what is there already.
set local client_min_messages = warning;
-- Names below are PostgreSQL's own, whatever somebody has put into `public`.
set local search_path = pg_catalog, pg_temp;

create schema if not exists pgpubsub;

-- Whoever may create a schema could have prepared this one, with a trigger or a
-- function of theirs in it that would run with the rights of whoever loads this
-- file. So all that is there must belong to the role that loads it, or to a
-- superuser, who needs no such trick. A superuser should not get around this by
-- `set role`, as a trigger can undo that.
do $$
declare
    found_owner name;
    found_object text;
begin
    select rolname, pg_describe_object(object.class, object.oid, 0)
      into found_owner, found_object
      from (select 'pg_namespace'::regclass as class, oid, nspowner as owner
              from pg_namespace where oid = 'pgpubsub'::regnamespace
            union all
            select 'pg_class'::regclass, oid, relowner
              from pg_class where relnamespace = 'pgpubsub'::regnamespace
            union all
            select 'pg_proc'::regclass, oid, proowner
              from pg_proc where pronamespace = 'pgpubsub'::regnamespace) as object
      join pg_roles on pg_roles.oid = object.owner
     where rolname <> current_user and not rolsuper
     limit 1;
    if found then
        raise exception '% belongs to role %, not to role %',
            found_object, quote_ident(found_owner), quote_ident(current_user)
            using hint = 'Nothing was changed. If that is right, load this file as '
                         'the role that owns it; else drop it first.';
    end if;
end
$$;

comment on schema pgpubsub is
    'pgpubsub: notifications for websocket clients';

-- Over a log in use: who publishes locks the outbox before anything else, so it is
-- locked first here, too. In another order there would be deadlocks.
do $$
begin
    if to_regclass('pgpubsub.outbox') is not null then
        lock table pgpubsub.outbox in access exclusive mode;
    end if;
end
$$;


-- Tables

-- An identity column's sequence has gaps (a transaction can fail after it drew
-- a number) and that is fine. It must not CACHE: each session would draw from
-- numbers of its own, and seq would say nothing about order.
create table if not exists pgpubsub.notification (
    seq          bigint      generated always as identity primary key,
    channel      text        not null,
    payload      text        not null,
    id           text,
    published_at timestamptz not null default clock_timestamp()
);
comment on table pgpubsub.notification is
    'The log: what was published, in commit order; written by publish() and prune() only';
comment on column pgpubsub.notification.seq is
    'Its number: what commits later has a higher one; there are gaps';
comment on column pgpubsub.notification.id is
    'The client it is for; null: whom its payload names, else everybody on the channel';
comment on column pgpubsub.notification.published_at is
    'When its transaction committed';

-- Where a notification waits for its transaction to commit. No row in here is
-- ever committed, so there is nothing that a crash could take from an unlogged
-- table, and no one ever sees a row but the transaction that wrote it.
create unlogged table if not exists pgpubsub.outbox (
    channel text not null
        -- as NOTIFY and LISTEN have it, lest nobody can subscribe to it
        constraint "a channel name has 1 to 63 bytes"
        check (octet_length(channel) between 1 and 63),
    payload text not null,
    id      text
);
comment on table pgpubsub.outbox is
    'Notifications of transactions that have not committed yet: looks empty, always';

create table if not exists pgpubsub.pruned (
    seq          bigint      not null,
    one_row      boolean     primary key default true check (one_row),
    published_at timestamptz not null default clock_timestamp()
);
-- Version 1.0 had no such column. Not `add column if not exists`, which locks out who
-- reads even when there is nothing to add, and deadlocks with whoever has locked the
-- view already and goes on to its tables. So the view comes first here, with them.
do $$
begin
    if not exists (select from pg_attribute
                    where attrelid = 'pgpubsub.pruned'::regclass
                      and attname = 'published_at') then
        lock table pgpubsub.bounds in access exclusive mode;
        alter table pgpubsub.pruned
            add column published_at timestamptz not null default clock_timestamp();
    end if;
end
$$;
comment on table pgpubsub.pruned is
    'One row: the log is complete after this seq; kept by prune()';
comment on column pgpubsub.pruned.published_at is
    'When the notification with this seq was published; until prune() has deleted one, when the log was made';

insert into pgpubsub.pruned (seq) values (0) on conflict do nothing;


-- Positions

-- A position is a place in the log that is not mistaken for one in another log:
-- a seq, and when the notification with that seq was published. After a failover
-- to a standby that lagged, or a restore, the same seq may be another notification.
-- Only here is its text made; all others compare it.
--
-- It has no `set search_path`, so that PostgreSQL can put it in line; instead it
-- names the operators' schema. Whoever may see what goes in may have what comes
-- out, so everybody may execute it. round() because PostgreSQL 13 computes with
-- floating point, which is exact to the microsecond once it is rounded.
create or replace function pgpubsub.position_of(seq bigint, published_at timestamptz)
returns text
language sql
stable
as $$
    select seq::text operator(pg_catalog.||) '-' operator(pg_catalog.||)
           pg_catalog.to_hex(pg_catalog.round(
               extract(epoch from published_at) operator(pg_catalog.*) 1000000)::bigint)
$$;
comment on function pgpubsub.position_of is
    'The position of the notification with this seq, published at that time: the seq, and microseconds since 1970 in hexadecimal';

-- The newest is not the sequence's last value: that number's transaction may not
-- have committed, and who reads on from it never sees what does. It is found by
-- one step in the index.
create or replace view pgpubsub.bounds as
select pruned.seq as pruned,
       coalesce(last.seq, pruned.seq) as newest,
       pgpubsub.position_of(pruned.seq, pruned.published_at) as pruned_position,
       coalesce(pgpubsub.position_of(last.seq, last.published_at),
                pgpubsub.position_of(pruned.seq, pruned.published_at)) as newest_position
  from pgpubsub.pruned
  left join (select seq, published_at
               from pgpubsub.notification order by seq desc limit 1) as last on true;
comment on view pgpubsub.bounds is
    'One row: every notification after seq `pruned` is in the log, the last one is `newest`; and their positions';

-- Stable, and so it sees what the statement around it sees: a volatile function
-- would see what has committed since that statement began.
create or replace function pgpubsub.position()
returns text
language sql
stable
security definer  -- so that who asks needs no rights on the log
set search_path = pg_catalog, pg_temp
as $$
    select newest_position from pgpubsub.bounds
$$;
comment on function pgpubsub.position() is
    'The position of the newest notification: who selects a state in the same statement can follow the log from there, and misses nothing';


-- Publishing

create or replace function pgpubsub.publish(channel text, payload text, id text default null)
returns void
language plpgsql
security definer  -- so that who may publish needs no rights on the tables
set search_path = pg_catalog, pg_temp
as $$
begin
    insert into pgpubsub.outbox (channel, payload, id)
    values (channel, coalesce(payload, ''), id);  -- null is '' to pg_notify, too
end
$$;
comment on function pgpubsub.publish(text, text, text) is
    'Publishes a payload of any length on a channel when the transaction commits: for one client (id); without an id, for the client that the payload names, else for everybody';

-- The same for what people have at hand, so that they need no casts. Only the
-- functions with a text id have a default for it, as a call without an id would
-- fit two functions otherwise. A literal and a null without a type are text to
-- PostgreSQL where it can choose.
create or replace function pgpubsub.publish(channel text, payload text, id bigint)
returns void language sql as $$
    select pgpubsub.publish(channel, payload, id::text)
$$;
create or replace function pgpubsub.publish(channel text, payload json, id text default null)
returns void language sql as $$
    select pgpubsub.publish(channel, payload::text, id)
$$;
create or replace function pgpubsub.publish(channel text, payload json, id bigint)
returns void language sql as $$
    select pgpubsub.publish(channel, payload::text, id::text)
$$;
create or replace function pgpubsub.publish(channel text, payload jsonb, id text default null)
returns void language sql as $$
    select pgpubsub.publish(channel, payload::text, id)
$$;
create or replace function pgpubsub.publish(channel text, payload jsonb, id bigint)
returns void language sql as $$
    select pgpubsub.publish(channel, payload::text, id::text)
$$;
comment on function pgpubsub.publish(text, text, bigint) is
    'publish() with a number as id';
comment on function pgpubsub.publish(text, json, text) is
    'publish() with a payload of JSON';
comment on function pgpubsub.publish(text, json, bigint) is
    'publish() with a payload of JSON and a number as id';
comment on function pgpubsub.publish(text, jsonb, text) is
    'publish() with a payload of JSON';
comment on function pgpubsub.publish(text, jsonb, bigint) is
    'publish() with a payload of JSON and a number as id';

-- What is locked at commit: a view, so that nothing else ever locks it. VACUUM and
-- ANALYZE lock tables in the same mode, and publishers would wait as long as such a
-- transaction lasts; an advisory lock could be taken by any role, and never given back.
create or replace view pgpubsub.commit_lock as select;
comment on view pgpubsub.commit_lock is
    'Has nothing in it: who publishes locks it while the transaction commits';

-- seq order is commit order: who has read up to a seq never finds a lower one
-- later. A number drawn as the row is written does not give that, because the
-- transaction that drew 5 can commit after the one that drew 6. So it is drawn
-- at commit, by a deferred trigger, under a lock that is held until others can
-- see the transaction. Taken any earlier, the lock would let transactions wait
-- for each other all their lives, and deadlock with their row locks.
--
-- For the same reason the trigger first goes to the back of the queue: other
-- deferred triggers, such as deferrable foreign keys, may have row locks to
-- wait for. It does so by deleting the row, which fires it once more, and then
-- writes to the log what it deleted. Triggers fire in the order in which they
-- were queued, so the notifications of a transaction stay in order; what a
-- savepoint takes back, row and queued trigger, never happened.
--
-- `set constraints all immediate` takes the lock early. The order holds, as the
-- lock does, but other publishers wait for the rest of that transaction.
create or replace function pgpubsub.log_at_commit()
returns trigger
language plpgsql
security definer  -- it runs as whoever commits
set search_path = pg_catalog, pg_temp
-- The outbox looks empty to the planner, which would scan it for each of the
-- many rows that a transaction can have in it.
set enable_seqscan = off
as $$
begin
    if tg_op = 'INSERT' then
        -- By its place in the table, which cannot change before commit: to
        -- look it up in an index would be a conflict with all other publishers
        -- in serializable transactions.
        delete from pgpubsub.outbox where ctid = new.ctid;
        if not found then
            raise exception 'pgpubsub.outbox was changed by other means than publish()';
        end if;
        return null;
    end if;

    lock table pgpubsub.commit_lock in share update exclusive mode;
    insert into pgpubsub.notification (channel, payload, id)
    values (old.channel, old.payload, old.id);
    -- The doorbell. PostgreSQL delivers equal ones of a transaction once.
    perform pg_notify('pgpubsub', '');
    return null;
end
$$;
comment on function pgpubsub.log_at_commit is
    'Trigger: moves a notification from the outbox to the log as its transaction commits';

drop trigger if exists log_at_commit on pgpubsub.outbox;
create constraint trigger log_at_commit after insert or delete on pgpubsub.outbox
    deferrable initially deferred
    for each row execute function pgpubsub.log_at_commit();
-- also where session_replication_role = replica turns off ordinary triggers
alter table pgpubsub.outbox enable always trigger log_at_commit;
comment on trigger log_at_commit on pgpubsub.outbox is
    'Draws seq at commit, under a lock: seq order is commit order';

-- Not `security definer`: a type can bring its own function that makes JSON of
-- it, which must not run with more rights than those of who writes to the table.
-- So whoever writes needs the right to publish().
create or replace function pgpubsub.notify_change()
returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    old_id text;
    new_id text;
begin
    if tg_when <> 'AFTER' or tg_level <> 'ROW' or tg_nargs not in (1, 2) then
        raise exception 'trigger % on % must be: after ... for each row execute function pgpubsub.notify_change(channel [, id_column])',
            tg_name, tg_relid::regclass;
    end if;

    -- An error if there is no such column, as null would mean everybody. So
    -- does a null in the column; declare it `not null` if that shall not be.
    if tg_nargs = 2 and tg_op <> 'INSERT' then
        execute format('select ($1).%I::text', tg_argv[1]) into old_id using old;
    end if;
    if tg_nargs = 2 and tg_op <> 'DELETE' then
        execute format('select ($1).%I::text', tg_argv[1]) into new_id using new;
    end if;

    if tg_op = 'UPDATE' and old_id is distinct from new_id then
        -- The row goes from one client to another: for the one it is gone, for
        -- the other it is new. Both must hear of it, and neither may see what
        -- the row is, or was, with the other.
        perform pgpubsub.publish(tg_argv[0], row_to_json(change)::text, old_id)
           from (select 'delete' as op, tg_table_name as "table", old_id as id,
                        null as new, row_to_json(old) as old) change;
        perform pgpubsub.publish(tg_argv[0], row_to_json(change)::text, new_id)
           from (select 'insert' as op, tg_table_name as "table", new_id as id,
                        row_to_json(new) as new, null as old) change;
    else
        perform pgpubsub.publish(tg_argv[0], row_to_json(change)::text, change.id)
           from (select lower(tg_op) as op, tg_table_name as "table",
                        coalesce(new_id, old_id) as id,
                        row_to_json(new) as new, row_to_json(old) as old) change;
    end if;
    return null;
end
$$;
comment on function pgpubsub.notify_change is
    'Row trigger (channel [, id_column]): publishes {"op", "table", "id", "new", "old"} for the client in id_column';


-- Pruning

create or replace function pgpubsub.prune(keep interval)
returns bigint
language plpgsql
strict  -- null is no interval: it deletes nothing
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    deleted bigint;
    last_seq bigint;
    last_published_at timestamptz;
begin
    -- All before the first one to keep, by seq, so that no gap comes into what
    -- is kept if the clock was set back; and it reads only what it deletes.
    with gone as (
        delete from pgpubsub.notification
         where seq < coalesce((select seq from pgpubsub.notification
                                where published_at >= now() - keep
                                order by seq limit 1),
                              9223372036854775807)
        returning seq, published_at
    )
    select seq, published_at, (select count(*) from gone)
      into last_seq, last_published_at, deleted
      from gone order by seq desc limit 1;
    if not found then
        return 0;
    end if;

    update pgpubsub.pruned set seq = last_seq, published_at = last_published_at
     where seq < last_seq;
    -- The doorbell: what servers have in memory they forget, too.
    perform pg_notify('pgpubsub', '');
    return deleted;
end
$$;
comment on function pgpubsub.prune is
    'Deletes what was published longer ago than `keep`, remembers how far, and returns the number of notifications deleted';


-- Privileges: none but those you grant, see above.

revoke all on schema pgpubsub from public;
revoke all on all tables in schema pgpubsub from public;
revoke all on all sequences in schema pgpubsub from public;
revoke all on all functions in schema pgpubsub from public;
grant execute on function pgpubsub.position_of(bigint, timestamptz) to public;

commit;
