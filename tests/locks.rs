//! Who keeps whom from an image: this library against itself and against QEMU, both ways.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use qcow2::Error;
use qcow2::image::options::Locking;
use qcow2::image::{BackingPolicy, CreateOptions, Image, OpenOptions, create};
use qcow2::storage::file::FileStorage;

fn scratch(name: &str) -> PathBuf {
    let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let dir = base.join(format!("libqcow2-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// read-write or not, and the locking.
type Way = (bool, Locking);
const WAYS: [Way; 5] = [
    (true, Locking::On),
    (false, Locking::On),
    (true, Locking::Shared),
    (false, Locking::Shared),
    (true, Locking::Off),
];

fn open(path: &Path, (writable, locking): Way) -> Result<Image, Error> {
    Image::open(path, &OpenOptions { read_only: !writable, locking, ..Default::default() })
}

/// May the second be there while the first is? What the lock bytes mean, in words.
fn go_together(first: Way, second: Way) -> bool {
    let objects = |(_, locking): Way| locking == Locking::On;
    let writes = |(writable, locking): Way| writable && locking != Locking::Off;
    !(objects(first) && writes(second) || objects(second) && writes(first))
}

#[test]
fn two_handles_of_this_library() {
    let dir = scratch("locks-own");
    let path = dir.join("image");
    create(&path, 1 << 20, &CreateOptions::default(), false).unwrap();
    for first in WAYS {
        for second in WAYS {
            let a = open(&path, first).unwrap();
            let b = open(&path, second);
            assert_eq!(b.is_ok(), go_together(first, second), "{first:?} then {second:?}");
            assert!(b.is_ok() || matches!(b.as_ref().err(), Some(Error::Locked { .. })));
            drop(b);
            a.close().unwrap();
            open(&path, (true, Locking::On)).expect("a closed handle holds nothing, even before it is dropped");
        }
    }
    let writer = open(&path, (true, Locking::On)).unwrap();
    let again = create(&path, 1 << 20, &CreateOptions::default(), true);
    assert!(matches!(again, Err(Error::Locked { .. })), "an image in use is not replaced");
    drop(writer);
    create(&path, 1 << 20, &CreateOptions::default(), true).unwrap();
    let _ = std::fs::remove_dir_all(&dir);
}

/// A handle that was closed, and is dropped only after the next one was opened on the same descriptor, once gave back
/// the lock of that next one.
#[test]
fn a_late_drop_leaves_the_next_handles_lock_alone() {
    let dir = scratch("locks-drop");
    let path = dir.join("image");
    create(&path, 1 << 20, &CreateOptions::default(), false).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let storage = Arc::new(FileStorage::new(file));
    let first = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    first.close().unwrap();
    let second = Image::open_storage(storage.clone(), &OpenOptions::default()).unwrap();
    drop(first);
    assert!(matches!(open(&path, (true, Locking::On)).err(), Some(Error::Locked { .. })));
    drop(second);
    open(&path, (true, Locking::On)).unwrap();
    let _ = std::fs::remove_dir_all(&dir);
}

/// A base and an overlay of it.
fn overlay_in(dir: &Path) -> (PathBuf, PathBuf) {
    let (base, top) = (dir.join("base"), dir.join("top"));
    create(&base, 1 << 20, &CreateOptions::default(), false).unwrap();
    let mut options = CreateOptions::default();
    options.set("backing_file", "base").unwrap();
    options.set("backing_fmt", "qcow2").unwrap();
    create(&top, 1 << 20, &options, false).unwrap();
    (base, top)
}

#[test]
fn a_backing_file_is_locked_as_read() {
    let dir = scratch("locks-backing");
    let (base, top) = overlay_in(&dir);
    let over = || Image::open(&top, &OpenOptions { backing: BackingPolicy::Any, ..Default::default() });
    let overlay = over().unwrap();
    open(&base, (false, Locking::On)).expect("others may read it");
    assert!(matches!(open(&base, (true, Locking::On)).err(), Some(Error::Locked { .. })), "nobody may write it");
    drop(overlay);
    let writer = open(&base, (true, Locking::On)).unwrap();
    assert!(matches!(over().err(), Some(Error::Locked { name }) if name == "base"));
    drop(writer);
    over().unwrap();
    let _ = std::fs::remove_dir_all(&dir);
}

/// A backing file's locks once went with its descriptor alone: a program that forks on another thread held them until
/// its child had exec'ed, and the next open was refused.
#[test]
fn a_fork_elsewhere_does_not_keep_the_locks() {
    let dir = scratch("locks-fork");
    let (base, top) = overlay_in(&dir);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                Command::new("true").status().unwrap();
            }
        });
        for _ in 0..2000 {
            drop(Image::open(&top, &OpenOptions { backing: BackingPolicy::Any, ..Default::default() }).unwrap());
            let again = open(&base, (true, Locking::On));
            if again.is_err() {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            again.unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let _ = std::fs::remove_dir_all(&dir);
}

/// A qemu-io that has the image open and waits for its next command.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &Path, (writable, locking): Way) -> Option<Self> {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]);
        command.args((!writable).then_some("-r"));
        command.args((locking == Locking::Shared).then_some("-U"));
        let mut child =
            command.arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        // It answers once the image is open, or ends.
        let _ = child.stdin.as_mut().unwrap().write_all(b"length\n");
        let mut answer = String::new();
        let mut reader = std::io::BufReader::new(child.stdout.take().unwrap());
        while !answer.contains("MiB") {
            if std::io::BufRead::read_line(&mut reader, &mut answer).unwrap() == 0 {
                child.wait().unwrap();
                return None;
            }
        }
        child.stdout = Some(reader.into_inner());
        Some(Self(child))
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

#[test]
fn this_library_and_qemu() {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "qemu-io is needed in CI");
        eprintln!("SKIPPED: qemu-io is not installed");
        return;
    }
    let dir = scratch("locks-qemu");
    let path = dir.join("image");
    create(&path, 1 << 20, &CreateOptions::default(), false).unwrap();
    // qemu-io has no shared writer: force-share is for readers there.
    let theirs = [(true, Locking::On), (false, Locking::On), (false, Locking::Shared)];
    for first in theirs {
        for second in WAYS {
            let qemu = QemuIo::open(&path, first).expect("nobody else is there");
            assert_eq!(open(&path, second).is_ok(), go_together(first, second), "QEMU {first:?}, then we {second:?}");
            drop(qemu);
        }
    }
    for first in WAYS {
        for second in theirs {
            let ours = open(&path, first).unwrap();
            let qemu = QemuIo::open(&path, second);
            assert_eq!(qemu.is_some(), go_together(first, second), "we {first:?}, then QEMU {second:?}");
            drop((ours, qemu));
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
}
