-- access.sql: who may subscribe to what, asked by pgpubsub's -auth flag.
--
-- A token gives its holder the right to subscribe to channels, as one client or
-- as any. The database keeps only the SHA-256 of a token: who reads the table,
-- or a backup of it, cannot subscribe with what is in it.
--
-- Load it, as often as you like, on PostgreSQL 13 or later, as any role that
-- may create a schema (it need not be a superuser):
--
--     psql -v ON_ERROR_STOP=1 -d DATABASE -f access.sql
--
-- Nobody else may do anything then. For roles of your own, here
-- `pgpubsub_server` for the role that pgpubsub connects as and `app` for what
-- logs your users in and out:
--
--     grant usage on schema pgpubsub to pgpubsub_server, app;
--     grant execute on function pgpubsub.may_subscribe to pgpubsub_server;
--     grant execute on function pgpubsub.issue_token, pgpubsub.revoke_token to app;
--
-- A token for customer 42 that is good for a day, one that sees all, and
-- pgpubsub asking for them:
--
--     select pgpubsub.issue_token('orders,customers', id => '42', valid => '1 day');
--     select pgpubsub.issue_token('*', note => 'dashboard in the hall');
--
--     pgpubsub.py -chan orders,customers -auth pgpubsub.may_subscribe
--
-- pgpubsub asks before a websocket opens, again and again while it is open (see
-- -recheck), and at once when revoke_token() commits: it closes whose token has
-- expired or was revoked. Expired rows do nothing; to be rid of them, once a day
-- by such a line in a crontab, which prints nothing that cron would mail:
--
--     0 3 * * * psql -d DATABASE -qc "delete from pgpubsub.access where expires_at < now()"

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

create table if not exists pgpubsub.access (
    token_hash bytea       not null check (octet_length(token_hash) = 32),
    channel    text        not null check (channel <> ''),
    id         text,
    expires_at timestamptz,
    note       text,
    created_at timestamptz not null default now()
);
-- Not unique: a token can have several rights.
create index if not exists access_token_hash on pgpubsub.access (token_hash);

comment on table pgpubsub.access is
    'What the holder of a token may subscribe to: one row a right, any of them will do';
comment on column pgpubsub.access.token_hash is
    'SHA-256 of the token';
comment on column pgpubsub.access.channel is
    'Channel; * is any number of characters, ? is one, all others are themselves';
comment on column pgpubsub.access.id is
    'Only as this client; null: as any client, and as none, who sees all of the channel';
comment on column pgpubsub.access.expires_at is
    'Good until then; null: until it is revoked';
comment on column pgpubsub.access.note is
    'For people';

create or replace function pgpubsub.may_subscribe(token text, channel text, id text)
returns boolean
language sql
stable
security definer  -- so that the server needs no rights on the table
set search_path = pg_catalog, pg_temp
as $$
    select exists (
        select from pgpubsub.access a
         where a.token_hash = sha256(convert_to(token, 'UTF8'))
           and token <> ''
           and (a.expires_at is null or a.expires_at > now())
           -- No id sees all, so it takes the right to all: for a null id this
           -- is true only where a.id is null.
           and (a.id is null or a.id = may_subscribe.id)
           -- What LIKE would take for its own wildcards is escaped with !, and
           -- then * and ? become them.
           and may_subscribe.channel like
               translate(replace(replace(replace(
                   a.channel, '!', '!!'), '%', '!%'), '_', '!_'),
                   '*?', '%_')
               escape '!'
    )
$$;
comment on function pgpubsub.may_subscribe is
    'For pgpubsub''s -auth: may the holder of this token subscribe to this channel as this client, or (null) to all of it?';

create or replace function pgpubsub.issue_token(
    channel text, id text default null, valid interval default null, note text default null)
returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    -- 244 bits from the operating system's random number generator
    token text := replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '');
begin
    insert into pgpubsub.access (token_hash, channel, id, expires_at, note)
    select sha256(convert_to(token, 'UTF8')), btrim(c), id, now() + valid, note
      from unnest(string_to_array(channel, ',')) c;
    if not found then
        raise exception 'a token needs a channel to be for';
    end if;
    return token;
end
$$;
comment on function pgpubsub.issue_token is
    'Makes a token for a comma-separated list of channels or patterns, and returns it: it is not kept, and cannot be shown again';

create or replace function pgpubsub.revoke_token(token text)
returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    delete from pgpubsub.access
     where token_hash = sha256(convert_to(token, 'UTF8'));
    if not found then
        return false;
    end if;
    -- Makes pgpubsub ask at once, when this commits, who may stay.
    perform pg_notify('pgpubsub', 'access');
    return true;
end
$$;
comment on function pgpubsub.revoke_token is
    'Takes all of a token''s rights from it, which closes its websockets; false if it had none';

-- Privileges: none but those you grant, see above.
-- They name what is of this file, lest they take what another one grants.
revoke all on schema pgpubsub from public;
revoke all on pgpubsub.access from public;
revoke all on function pgpubsub.may_subscribe(text, text, text),
    pgpubsub.issue_token(text, text, interval, text), pgpubsub.revoke_token(text)
    from public;

commit;
