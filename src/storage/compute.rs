//! Computing on several threads for a blocking call: they are started when there is enough to do, and have ended when it
//! returns.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Builder, available_parallelism, scope};

/// A thread takes some 50 microseconds to be started and ended; each has to be worth that a few times over.
const WORTH_A_THREAD_MICROS: u64 = 200;

/// Threads that help somewhere in this process.
static HELPING: AtomicUsize = AtomicUsize::new(0);

fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| available_parallelism().map_or(1, usize::from))
}

/// Threads that may be started, given back when dropped: all calls together have at most one for each processor, beside
/// those that make the calls.
struct Allowed(usize);

impl Allowed {
    fn take(wanted: usize) -> Self {
        let room = |helping: usize| processors().saturating_sub(helping).min(wanted);
        let taken = HELPING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n + room(n)));
        Self(taken.map_or(0, room))
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        HELPING.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Calls `work` for each part from 0 to `parts`, and returns when all are done. A part takes about `part_micros`.
pub fn on_threads(parts: usize, part_micros: u64, work: &(dyn Fn(usize) + Sync)) {
    let worth = parts as u64 * part_micros / WORTH_A_THREAD_MICROS;
    let wanted = (worth as usize).min(parts).min(processors()).saturating_sub(1); // the caller works as well
    if wanted == 0 {
        return (0..parts).for_each(work);
    }
    let allowed = Allowed::take(wanted);
    let next = AtomicUsize::new(0);
    let serve = || {
        let part = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&part| part < parts);
        std::iter::from_fn(part).for_each(work);
    };
    scope(|scope| {
        for _ in 0..allowed.0 {
            // Where no thread can be had there is one less.
            let _ = Builder::new().name("qcow2-cpu".into()).spawn_scoped(scope, serve);
        }
        serve();
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;
    use std::sync::Mutex;

    #[test]
    fn each_part_is_done_once() {
        for (parts, part_micros) in [(0, 1000), (1, 1000), (5, 1), (40, 1000), (3000, 1)] {
            let done = Mutex::new(vec![0; parts]);
            on_threads(parts, part_micros, &|part| done.lock().unwrap()[part] += 1);
            assert_eq!(done.into_inner().unwrap(), vec![1; parts]);
        }
    }

    #[test]
    fn a_panic_gets_to_the_caller_and_no_thread_is_lost() {
        for bad in [0, 7, 39] {
            let panics = catch_unwind(|| on_threads(40, 1000, &|part| assert!(part != bad, "of the test")));
            assert!(panics.is_err());
        }
        assert!(HELPING.load(Ordering::Relaxed) <= processors());
        assert!(Allowed::take(1000).0 <= processors());
    }
}
