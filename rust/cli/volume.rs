// SPDX-License-Identifier: GPL-2.0-only

//! `rblk storage` and `rblk volume`.

use crate::args::{VolumeCommand, VolumeStorageCommand};
use crate::exit::{self, Error};
use crate::table;
use ::volume::etcd::Etcd;
use ::volume::record::ROOT;
use ::volume::{Collected, Config, Errno, Registry, VolumeInfo};
use api::{Failure, FailureKind};
use serde::Serialize;
use serde_json::json;
use std::io::{self, Write};
use std::time::Duration;

/// Time after which the list is read again without a change.
const FOLLOW_TIME: Duration = Duration::from_secs(60);

/// Runs a command for storages.
pub fn run_storage(command: &VolumeStorageCommand, json: bool) -> Result<(), Error> {
    let registry = connect()?;
    match command {
        VolumeStorageCommand::Add {
            name,
            uri,
            allows_loss,
        } => Ok(registry
            .add_storage(name, &storage_uri(uri, *allows_loss))
            .map_err(failure)?),
        VolumeStorageCommand::List { check: false } => list_storages(&registry, json),
        VolumeStorageCommand::List { check: true } => check_storages(&registry, json),
        VolumeStorageCommand::Remove { name } => {
            Ok(registry.remove_storage(name).map_err(failure)?)
        }
    }
}

/// Runs a command for volumes.
pub fn run_volume(command: &VolumeCommand, json: bool) -> Result<(), Error> {
    let registry = connect()?;
    match command {
        VolumeCommand::Create { volume, size } => {
            Ok(registry.create(volume, *size).map_err(failure)?)
        }
        VolumeCommand::List {
            storage,
            follow: false,
        } => list(&registry, storage.as_deref(), json),
        VolumeCommand::List { storage, .. } => follow(&registry, storage.as_deref(), json),
        VolumeCommand::Info { volume } => info(&registry.info(volume).map_err(failure)?, json),
        VolumeCommand::Resize { volume, size } => {
            Ok(registry.resize(volume, *size).map_err(failure)?)
        }
        VolumeCommand::Snapshot { volume, snapshot } => {
            Ok(registry.snapshot(volume, snapshot).map_err(failure)?)
        }
        VolumeCommand::Clone {
            volume,
            snapshot,
            new,
        } => Ok(registry
            .clone_volume(volume, snapshot, new)
            .map_err(failure)?),
        VolumeCommand::Remove { volume } => {
            if !registry.remove(volume).map_err(failure)? {
                eprintln!(
                    "its image is kept while it is in use or has clones; then run rblk volume gc"
                );
            }
            Ok(())
        }
        VolumeCommand::Release { volume } => Ok(registry.release(volume).map_err(failure)?),
        VolumeCommand::HandOver { volume, host } => {
            Ok(registry.hand_over(volume, host).map_err(failure)?)
        }
        VolumeCommand::Gc { storage, unknown } => {
            collect(&registry, storage.as_deref(), *unknown, json)
        }
    }
}

fn connect() -> Result<Registry<Etcd>, Failure> {
    let config = Config::load().map_err(failure)?;
    Ok(::volume::connect(&config))
}

/// Returns the failure for an error of the registry or of a storage.
fn failure(error: ::volume::Error) -> Failure {
    let kind = match error.errno() {
        Errno::INVAL => FailureKind::InvalidCall,
        Errno::TIMEDOUT => FailureKind::NoAnswer,
        Errno::BUSY | Errno::OPNOTSUPP | Errno::AGAIN => FailureKind::Refused,
        _ => FailureKind::Failed,
    };
    Failure::new(kind, error.cause(), error.remedy())
}

fn storage_uri(uri: &str, allows_loss: bool) -> String {
    match allows_loss && uri.starts_with("gluster:") && !uri.contains('?') {
        true => format!("{uri}?unsafe=on"),
        false => uri.to_owned(),
    }
}

fn print(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(|error| {
        Failure::new(FailureKind::Failed, format!("JSON: {error}"), "report this")
    })?;
    exit::print(&format!("{text}\n"))?;
    Ok(())
}

fn list_storages(registry: &Registry<Etcd>, json: bool) -> Result<(), Error> {
    let storages = registry.storages().map_err(failure)?;
    if json {
        return print(&storages);
    }
    let mut rows = vec![["NAME", "URI"].map(str::to_owned)];
    rows.extend(
        storages
            .into_iter()
            .map(|storage| [storage.name, storage.uri]),
    );
    exit::print(&table::align(&rows))?;
    Ok(())
}

/// Returns the names of one or all storages.
fn names(registry: &Registry<Etcd>, name: Option<&str>) -> Result<Vec<String>, Failure> {
    if let Some(name) = name {
        return Ok(vec![name.to_owned()]);
    }
    let storages = registry.storages().map_err(failure)?;
    Ok(storages.into_iter().map(|storage| storage.name).collect())
}

/// Opens storages and counts their images. Fails if one cannot be used, after it has tried all.
fn check_storages(registry: &Registry<Etcd>, json: bool) -> Result<(), Error> {
    let mut rows = vec![["NAME", "IMAGES", "STATE"].map(str::to_owned)];
    let mut all = Vec::new();
    let mut failed = None;
    for name in names(registry, None)? {
        match registry.check_storage(&name) {
            Ok(images) => {
                all.push(json!({"name": name, "images": images, "error": null}));
                rows.push([name, images.to_string(), "ok".to_owned()]);
            }
            Err(error) => {
                all.push(json!({"name": name, "images": null, "error": error.to_string()}));
                rows.push([name, "-".to_owned(), error.to_string()]);
                failed = Some(failure(error));
            }
        }
    }
    if json {
        print(&all)?;
    } else {
        exit::print(&table::align(&rows))?;
    }
    failed.map_or(Ok(()), |failure| Err(failure.into()))
}

fn list(registry: &Registry<Etcd>, storage: Option<&str>, json: bool) -> Result<(), Error> {
    let volumes = registry.list(storage).map_err(failure)?;
    if json {
        return print(&volumes);
    }
    exit::print(&rows(&volumes))?;
    Ok(())
}

/// Lists the volumes, as one line of JSON or a table, each time that the list has changed.
fn follow(registry: &Registry<Etcd>, storage: Option<&str>, json: bool) -> Result<(), Error> {
    let mut shown = None;
    loop {
        let revision = registry.store().revision().map_err(failure)?;
        let volumes = registry.list(storage).map_err(failure)?;
        let text = match json {
            true => json!(volumes).to_string() + "\n",
            false => rows(&volumes) + "\n",
        };
        if shown.as_ref() != Some(&text) {
            let written = io::stdout().write_all(text.as_bytes());
            if written.and_then(|()| io::stdout().flush()).is_err() {
                // No one reads any more.
                return Ok(());
            }
            shown = Some(text);
        }
        registry
            .store()
            .wait_for_change(ROOT, revision, FOLLOW_TIME);
    }
}

fn rows(volumes: &[VolumeInfo]) -> String {
    let mut rows = vec![["VOLUME", "SIZE", "ATTACHED"].map(str::to_owned)];
    rows.extend(volumes.iter().map(|volume| {
        [
            volume.name.to_string(),
            table::size(volume.volume.size),
            attached(volume),
        ]
    }));
    table::align(&rows)
}

fn attached(volume: &VolumeInfo) -> String {
    match (&volume.writer, &volume.last_writer, volume.readers.len()) {
        (Some(writer), ..) => format!("{}, {}", writer.host, writer.disk),
        (None, Some(last), _) => format!("not detached on {}, {}", last.host, last.disk),
        (None, None, 0) => "no".to_owned(),
        (None, None, readers) => format!("for reading, {readers} times"),
    }
}

fn info(volume: &VolumeInfo, json: bool) -> Result<(), Error> {
    if json {
        return print(volume);
    }
    let row = |name: &str, value: String| [name.to_owned(), value];
    let mut rows = vec![
        row("volume", volume.name.to_string()),
        row("image", format!("rblk-{}", volume.volume.uuid)),
        row("size", table::size(volume.volume.size)),
    ];
    if let Some((parent, snapshot)) = &volume.volume.clone_of {
        rows.push(row("clone of", format!("{parent}, snapshot {snapshot}")));
    }
    let snapshots = volume.volume.snapshots.iter();
    rows.extend(snapshots.map(|snapshot| row("snapshot", snapshot.name.clone())));
    let writer = volume.writer.iter();
    rows.extend(writer.map(|holder| row("attached", holder.to_string())));
    let last = volume
        .last_writer
        .iter()
        .filter(|_| volume.writer.is_none());
    rows.extend(last.map(|holder| row("attached, without news", holder.to_string())));
    let readers = volume.readers.iter();
    rows.extend(readers.map(|holder| row("attached for reading", holder.to_string())));
    if volume.volume.pending.is_some() {
        rows.push(row("change", "not complete".to_owned()));
    }
    exit::print(&table::align(&rows))?;
    Ok(())
}

/// Collects the images of one or all storages. Fails if one cannot be used, after it has tried all.
fn collect(
    registry: &Registry<Etcd>,
    storage: Option<&str>,
    removes_unknown: bool,
    json: bool,
) -> Result<(), Error> {
    let mut failed = None;
    for name in names(registry, storage)? {
        let collected = match registry.collect(&name, removes_unknown) {
            Ok(collected) => collected,
            Err(error) => {
                let context = format!("{name}: {}", error.cause());
                let remedy = error.remedy().to_owned();
                let error = ::volume::Error::new(error.errno(), context, remedy);
                if let Some(earlier) = failed.replace(error) {
                    eprintln!("{earlier}");
                }
                continue;
            }
        };
        if json {
            print(&json!({"storage": name, "collected": collected}))?;
        } else {
            exit::print(&report(&name, &collected))?;
        }
    }
    failed.map_or(Ok(()), |error| Err(failure(error).into()))
}

fn report(storage: &str, collected: &Collected) -> String {
    let lists = [
        ("removed", &collected.removed),
        ("in use or being created", &collected.waiting),
        ("repaired", &collected.repaired),
        ("has no image", &collected.missing),
        (
            "not in the registry; rblk volume gc --unknown removes it",
            &collected.unknown,
        ),
    ];
    let lines = lists.iter().flat_map(|(what, names)| {
        names
            .iter()
            .map(move |name| format!("{storage}: {name}: {what}\n"))
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_is_a_parameter_of_gluster() {
        assert_eq!(
            storage_uri("gluster://h/v", true),
            "gluster://h/v?unsafe=on"
        );
        assert_eq!(storage_uri("gluster://h/v", false), "gluster://h/v");
        assert_eq!(storage_uri("rbd:pool", true), "rbd:pool");
    }

    #[test]
    fn a_collection_is_reported_line_by_line() {
        let collected = Collected {
            removed: vec!["a".to_owned()],
            missing: vec!["s/b".to_owned()],
            ..Collected::default()
        };
        assert_eq!(
            report("s", &collected),
            "s: a: removed\ns: s/b: has no image\n"
        );
    }
}
