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
-- pgpubsub asks when a websocket opens; one that is open stays open when its
-- token expires or is revoked. Expired rows do nothing; to be rid of them:
--
--     delete from pgpubsub.access where expires_at < now();

begin;

-- Loading it again need not tell what is there already.
set local client_min_messages = warning;

create schema if not exists pgpubsub;
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
    return found;
end
$$;
comment on function pgpubsub.revoke_token is
    'Takes all of a token''s rights from it; false if it had none';

-- Privileges: none but those you grant, see above.
revoke all on schema pgpubsub from public;
revoke all on all tables in schema pgpubsub from public;
revoke all on all functions in schema pgpubsub from public;

commit;
