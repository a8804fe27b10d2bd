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

/// The image with some bytes replaced.
fn damaged(sound: &[u8], damage: &images::Damage) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for (at, value) in &damage.writes {
        let end = at + value.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[*at..end].copy_from_slice(value);
    }
    bytes
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
            let bytes = damaged(&sound, &damage);
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
        let bytes = damaged(&sound, &damage);
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
