// SPDX-License-Identifier: GPL-2.0-only

//! The last events, for clients that follow them.

use api::{DiskId, Event, EventKind, Phase, Record};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The number of events that are kept.
const KEPT: usize = 1000;

/// The factor between the time of the first event and its number.
const FIRST_NUMBER: u64 = 1000;

/// The last events.
///
/// Context: used by all threads.
#[derive(Default)]
pub struct Journal {
    events: Mutex<VecDeque<Event>>,
    added: Condvar,
}

impl Journal {
    /// Adds an event.
    pub fn add(&self, disk: Option<DiskId>, kind: EventKind, text: String) {
        let mut events = self.lock();
        // Those of this rblkd are greater than those of an earlier one.
        let number = match events.back() {
            Some(last) => last.number.saturating_add(1),
            None => now().saturating_mul(FIRST_NUMBER),
        };
        events.push_back(Event {
            number,
            time: now(),
            disk,
            kind,
            text,
        });
        if events.len() > KEPT {
            events.pop_front();
        }
        self.added.notify_all();
    }

    /// Adds the event that a change of a disk's record is, if it is one.
    ///
    /// `end` is the reason if a process has ended. The record does not have it if another process
    /// was started at once.
    pub fn add_change(&self, before: Option<&Record>, after: Option<&Record>, end: Option<String>) {
        let is_recorded = after.is_some_and(|record| matches!(record.phase, Phase::Failed { .. }));
        if let (Some(record), Some(text), false) = (before, end, is_recorded) {
            self.add(Some(record.disk), EventKind::Failed, text);
        }
        if let Some((record, kind, text)) = change(before, after) {
            self.add(Some(record.disk), kind, text);
        }
    }

    /// Returns the events with a greater number than `after`. Waits for one for up to `timeout`.
    pub fn after(&self, after: u64, timeout: Duration) -> Vec<Event> {
        let is_old =
            |events: &mut VecDeque<Event>| events.back().is_none_or(|last| last.number <= after);
        let waited = self.added.wait_timeout_while(self.lock(), timeout, is_old);
        let (events, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let newer = events.iter().filter(|event| event.number > after);
        newer.cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Event>> {
        // A list is whole after each statement.
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the time in seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn change<'a>(
    before: Option<&'a Record>,
    after: Option<&'a Record>,
) -> Option<(&'a Record, EventKind, String)> {
    let Some(record) = after else {
        return before.map(|record| (record, EventKind::Detached, "detached".to_owned()));
    };
    if before.is_some_and(|before| before.phase == record.phase) {
        return None;
    }
    match &record.phase {
        Phase::Starting | Phase::Opening { .. } => None,
        Phase::Running { pid, .. } => {
            let text = format!("process {pid} has opened {}", record.image);
            Some((record, EventKind::Served, text))
        }
        Phase::Failed { cause } => Some((record, EventKind::Failed, cause.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    fn record(phase: Phase) -> Record {
        Record {
            disk: DiskId {
                domid: 5,
                devid: 51712,
            },
            name: "xvda".to_owned(),
            domain: None,
            image: "aio:/a".to_owned(),
            restarts: 0,
            replaced: None,
            phase,
        }
    }

    #[test]
    fn changes_of_records_are_events() {
        let journal = Journal::default();
        let running = record(Phase::Running {
            pid: 7,
            start_time: 1,
        });
        let failed = record(Phase::Failed {
            cause: "no file".to_owned(),
        });
        let change = |before: Option<&Record>, after: Option<&Record>| {
            journal.add_change(before, after, None);
        };
        change(None, Some(&record(Phase::Starting)));
        change(None, Some(&running));
        change(Some(&running), Some(&running));
        let end = Some("no file".to_owned());
        journal.add_change(Some(&running), Some(&failed), end);
        change(Some(&failed), None);
        let events = journal.after(0, Duration::ZERO);
        let kinds: Vec<EventKind> = events.iter().map(|event| event.kind).collect();
        assert_eq!(
            kinds,
            [EventKind::Served, EventKind::Failed, EventKind::Detached]
        );
        let second = events.get(1).unwrap();
        assert_eq!(second.text, "no file");
        assert_eq!(journal.after(second.number, Duration::ZERO).len(), 1);

        let last = events.last().unwrap().number;
        let (opening, end) = (record(Phase::Starting), Some("killed".to_owned()));
        journal.add_change(Some(&running), Some(&opening), end);
        let [event] = &journal.after(last, Duration::ZERO)[..] else {
            panic!("there is no event, or several");
        };
        assert_eq!(
            (event.kind, event.text.as_str()),
            (EventKind::Failed, "killed")
        );
    }

    #[test]
    fn old_events_are_dropped_and_their_numbers_are_not_used_again() {
        let journal = Journal::default();
        let add = || journal.add(None, EventKind::Storage, String::new());
        add();
        let first = journal.after(0, Duration::ZERO)[0].number;
        (0..KEPT).for_each(|_| add());
        let events = journal.after(0, Duration::ZERO);
        assert_eq!(events.len(), KEPT);
        assert_eq!(events[0].number, first + 1);
    }

    #[test]
    fn a_client_waits_for_an_event() {
        let journal = Arc::new(Journal::default());
        let waiting = journal.clone();
        let client = thread::spawn(move || waiting.after(0, Duration::from_secs(60)));
        journal.add(None, EventKind::Storage, "down".to_owned());
        assert_eq!(client.join().unwrap().len(), 1);
    }
}
