//! Checks and repairs against `qemu-img check`: sound images of all kinds, and images with one thing wrong. Where
//! verdict or counts differ, `docs/divergences.md` says why, and the test names the class. After a repair the image is
//! sound for QEMU too, reads what it read, and a second repair finds nothing to do.

mod qemu;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use qcow2::OpenOptions;
use qcow2::image::check::{CheckOptions, CheckResult, Finding, FindingKind, Repair, check};

/// What `qemu-img check --output=json` says; `None` where it cannot check the image at all.
fn qemu_check(path: &str, repair: Option<&str>) -> Option<BTreeMap<String, u64>> {
    let mut command = Command::new("qemu-img");
    command.args(["check", "-f", "qcow2", "--output=json"]);
    if let Some(what) = repair {
        command.args(["-r", what]);
    }
    let out = command.arg(path).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let numbers = text.lines().filter_map(|line| {
        let (key, value) = line.trim().trim_end_matches(',').split_once(": ")?;
        Some((key.trim_matches('"').to_owned(), value.parse().ok()?))
    });
    text.contains("check-errors").then(|| numbers.collect())
}

fn ours(path: &str, repair: Repair) -> (CheckResult, Vec<Finding>) {
    let mut findings = Vec::new();
    let mut note = |finding: &Finding| findings.push(finding.clone());
    let mut options = CheckOptions { repair, on_finding: Some(&mut note), ..CheckOptions::default() };
    let result = check(path.as_ref(), &OpenOptions::default(), &mut options).unwrap();
    (result, findings)
}

fn as_map(result: &CheckResult) -> BTreeMap<String, u64> {
    let pairs = [
        ("corruptions", result.corruptions),
        ("leaks", result.leaks),
        ("check-errors", result.check_errors),
        ("corruptions-fixed", result.corruptions_fixed),
        ("leaks-fixed", result.leaks_fixed),
        ("total-clusters", result.total_clusters),
        ("allocated-clusters", result.allocated_clusters),
        ("fragmented-clusters", result.fragmented_clusters),
        ("compressed-clusters", result.compressed_clusters),
        ("image-end-offset", result.image_end_offset),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// What QEMU leaves out is 0.
fn assert_agrees(result: &CheckResult, theirs: &BTreeMap<String, u64>, but: &[&str], what: &str) {
    for (key, value) in as_map(result) {
        if !but.contains(&key.as_str()) {
            assert_eq!(value, theirs.get(&key).copied().unwrap_or(0), "{what}: {key}\nours: {result:?}\n{theirs:?}");
        }
    }
}

#[path = "check_repair/images.rs"]
mod images;

#[test]
fn sound_images_of_all_kinds_are_sound() {
    let Some(dir) = qemu::dir("check-sound") else { return };
    for recipe in images::recipes() {
        let path = images::make(&dir, &recipe);
        let (result, findings) = ours(&path, Repair::Nothing);
        assert_eq!((result.corruptions, result.leaks), (0, 0), "{}: {findings:?}", recipe.name);
        assert_agrees(&result, &qemu_check(&path, None).unwrap(), &[], recipe.name);
    }
}

/// What each sector reads, by QEMU; an image that it cannot read has no content.
fn content(dir: &qemu::Dir, path: &str) -> Option<Vec<u8>> {
    let raw = dir.path("content.raw");
    let out = Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw", path, &raw]).output().unwrap();
    out.status.success().then(|| fs::read(raw).unwrap())
}

#[test]
fn damaged_images_are_told_counted_and_repaired_as_by_qemu() {
    let Some(dir) = qemu::dir("check-damaged") else { return };
    let (mut cases, mut repaired, mut differ) = (0, 0, BTreeMap::<&str, u64>::new());
    for recipe in images::recipes() {
        let path = images::make(&dir, &recipe);
        let sound = fs::read(&path).unwrap();
        for damage in images::damages(&sound, &recipe) {
            let what = format!("{}: {}", recipe.name, damage.name);
            let bytes = images::damaged(&sound, &damage);
            fs::write(&path, &bytes).unwrap();
            cases += 1;
            let theirs = qemu_check(&path, None);
            let (result, findings) = ours(&path, Repair::Nothing);
            assert_eq!(fs::read(&path).unwrap(), bytes, "{what}: a check has written");
            match (&theirs, damage.differs) {
                (Some(theirs), None) => assert_agrees(&result, theirs, &[], &format!("{what} {findings:#x?}")),
                (_, Some(class)) => *differ.entry(class).or_default() += 1,
                (None, None) => panic!("{what}: QEMU cannot check it"),
            }
            let before = content(&dir, &path);
            let (fixed, _) = ours(&path, Repair::All);
            assert_eq!((fixed.leaks, fixed.check_errors), (0, 0), "{what}: {fixed:?}");
            let theirs = qemu_check(&path, None).unwrap_or_else(|| panic!("{what}: not repaired for QEMU"));
            let left = theirs.get("corruptions").copied().unwrap_or(0);
            assert_eq!(theirs.get("leaks").copied().unwrap_or(0), 0, "{what}");
            assert_eq!(left == 0, damage.repairable, "{what}: {theirs:?} {fixed:?}");
            repaired += u64::from(left == 0);
            let after = content(&dir, &path);
            assert!(before.is_none() || before == after, "{what}: what the guest reads has changed");
            let bytes = fs::read(&path).unwrap();
            let (again, _) = ours(&path, Repair::All);
            assert_eq!(again.corruptions, fixed.corruptions, "{what}");
            assert_eq!((again.corruptions_fixed, again.leaks_fixed), (0, 0), "{what}: not idempotent");
            assert_eq!(fs::read(&path).unwrap(), bytes, "{what}: a second repair has written");
        }
    }
    println!("{cases} damaged images, {repaired} repaired; told otherwise than by QEMU: {differ:?}");
    assert!(cases > 200 && repaired * 2 > cases, "{cases} {repaired}");
}

#[test]
fn leaks_alone_are_repaired_alone() {
    let Some(dir) = qemu::dir("check-leaks") else { return };
    let recipe = images::recipes().into_iter().next().unwrap();
    let path = images::make(&dir, &recipe);
    let sound = fs::read(&path).unwrap();
    for damage in images::damages(&sound, &recipe).into_iter().filter(|damage| damage.differs.is_none()) {
        let bytes = images::damaged(&sound, &damage);
        fs::write(&path, &bytes).unwrap();
        let (before, findings) = ours(&path, Repair::Nothing);
        let (after, _) = ours(&path, Repair::Leaks);
        let needs_rebuild = before.leaks == after.leaks;
        let kinds: Vec<FindingKind> = findings.iter().map(|finding| finding.kind).collect();
        if needs_rebuild {
            assert_eq!(fs::read(&path).unwrap(), bytes, "{}: {kinds:?}", damage.name);
        } else {
            assert_eq!((after.leaks, after.leaks_fixed), (0, before.leaks), "{}", damage.name);
            assert!(after.corruptions <= before.corruptions, "{}: {before:?} {after:?}", damage.name);
        }
    }
}

/// Among requests of other threads, which it waits for and keeps waiting: nothing is wrong at any moment, not even a leak.
#[test]
fn an_open_image_is_checked_between_the_writes_of_other_threads() {
    use qcow2::Image;
    use qcow2::image::{CreateOptions, ZeroFlags, create_with};
    use qcow2::storage::{Blocking, memory::MemoryStorage};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    let storage = Arc::new(MemoryStorage::default());
    let options = CreateOptions { cluster_size_bytes: 4096, ..CreateOptions::default() };
    qcow2::wait::block_on(create_with(&Blocking, &*storage, 32 << 20, &options)).unwrap();
    let image = Image::open_storage(storage, &OpenOptions::default()).unwrap();
    let (is_done, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let (image, is_done, writes) = (&image, &is_done, &writes);
            scope.spawn(move || {
                for n in (1..).take_while(|_| !is_done.load(Ordering::Relaxed)) {
                    let at = (n * 7919 + thread * 104_729) % 8000 * 4096;
                    match n % 5 {
                        0 => image.discard(at, 20 * 4096).unwrap(),
                        1 => image.write_zeroes(at, 5000, ZeroFlags::default()).unwrap(),
                        _ => image.pwrite(&[thread as u8; 6000], at).unwrap(),
                    }
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..40 {
            let seen = writes.load(Ordering::Relaxed);
            let (mut told, mut meanwhile) = (0, 0);
            let mut look = |_, _| {
                told += 1;
                if told == 2 {
                    let before = writes.load(Ordering::Relaxed);
                    std::thread::sleep(std::time::Duration::from_millis(10));
                    meanwhile = writes.load(Ordering::Relaxed) - before;
                }
                true
            };
            let result = image.check(&mut CheckOptions { on_progress: Some(&mut look), ..CheckOptions::default() });
            // Who was on the way out when the check began counts itself, once.
            let is_alone = told > 1 && meanwhile <= 3;
            let is_clean = is_alone && result.as_ref().is_ok_and(|result| result.is_sound() && result.leaks == 0);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while is_clean && writes.load(Ordering::Relaxed) < seen + 20 && std::time::Instant::now() < deadline {
                std::thread::yield_now();
            }
            let goes_on = writes.load(Ordering::Relaxed) >= seen + 20;
            is_done.fetch_or(!is_clean || !goes_on, Ordering::Relaxed); // the threads end, whatever is said here
            assert!(is_clean && goes_on, "round {round}: {meanwhile} writes ended during the check, {result:?}");
        }
        is_done.store(true, Ordering::Relaxed);
    });
    let repair = image.check(&mut CheckOptions { repair: Repair::All, ..CheckOptions::default() });
    assert!(repair.unwrap_err().to_string().contains("close it"));
}

/// An image that a killed QEMU left dirty: a reader and an inspector leave it alone, a writer repairs it first.
#[test]
fn an_image_that_was_left_dirty_is_repaired_when_it_is_opened_to_be_written() {
    let Some(dir) = qemu::dir("check-dirty") else { return };
    for options in
        ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=16k,extended_l2=on", "lazy_refcounts=on,cluster_size=512"]
    {
        let path = dir.path("dirty.qcow2");
        qemu::img(&["create", "-q", "-f", "qcow2", "-o", options, &path, "4M"]);
        let killed = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 9 64k 300k", "-c", "flush", "-c", "abort", &path])
            .output()
            .unwrap();
        assert!(!killed.status.success());
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes[79] & 1, 1, "{options}: not left dirty");
        let (before, _) = ours(&path, Repair::Nothing);
        assert!(before.corruptions > 0, "{options}: {before:?}");
        assert_agrees(&before, &qemu_check(&path, None).unwrap(), &[], options);

        let mut found = vec![0; 300 << 10];
        for (read_only, inspect) in [(true, false), (false, true)] {
            let how = OpenOptions { read_only, inspect, ..OpenOptions::default() };
            let image = qcow2::Image::open(path.as_ref(), &how).unwrap();
            assert!(image.info().dirty);
            assert!(inspect || image.pread(&mut found, 64 << 10).is_ok());
            image.close().unwrap();
        }
        assert_eq!(fs::read(&path).unwrap(), bytes, "{options}: reading has written");

        let image = qcow2::Image::open(path.as_ref(), &OpenOptions::default()).unwrap();
        image.pread(&mut found, 64 << 10).unwrap();
        assert!(found.iter().all(|byte| *byte == 9) && !image.info().dirty);
        image.pwrite(&[8; 4096], 1 << 20).unwrap();
        image.close().unwrap();
        qemu::check(&path, false);
        qemu::io(&path, &["read -q -P 9 64k 300k", "read -q -P 8 1M 4k"]);
    }
}

/// What is left of a corruption keeps a dirty image from being written: counts may be right, the entry is not.
#[test]
fn a_dirty_image_that_cannot_be_repaired_is_not_opened_to_be_written() {
    let Some(dir) = qemu::dir("check-dirty-corrupt") else { return };
    let recipe = images::recipes().into_iter().next().unwrap();
    let path = images::make(&dir, &recipe);
    let sound = fs::read(&path).unwrap();
    let damages = images::damages(&sound, &recipe);
    let damage = damages.iter().find(|damage| damage.name == "data is not aligned").unwrap();
    let mut bytes = images::damaged(&sound, damage);
    bytes[79] |= 1;
    fs::write(&path, &bytes).unwrap();
    let refused = qcow2::Image::open(path.as_ref(), &OpenOptions::default()).err();
    assert_eq!(refused, Some(qcow2::Error::NeedsRepair));
    assert_eq!(fs::read(&path).unwrap()[79] & 1, 1, "still dirty");
    qcow2::Image::open(path.as_ref(), &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
}
