using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Power that goes at any moment of a run. The changes that the run makes to its output folder are
/// recorded; a file system may have kept any of them and lost any other, but those before a flush
/// of their folder. Of each such state: what is called checkpoint-N is whole, the run goes on from
/// a checkpoint no older than one that was there when it was said to be saved.
/// </summary>
[TestFixture]
public sealed class PowerLossTests
{
    private static readonly string[] s_parts = ["adapter_model.safetensors", "adapter_config.json",
        "optimizer.safetensors", "run_state.json", "trainer_state.json"];

    private string _folder = "";
    private TrainArguments _arguments = new();

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase(false)]
    [TestCase(true)]
    public void NoOrderOfLostChangesLeavesABrokenCheckpoint(bool overwrites)
    {
        Recording run = Record(overwrites);
        Assert.That(run.Changes.Count(c => c.Kind == DiskChangeKind.FolderFlushed),
            Is.GreaterThan(10), "the run is seen");
        Assert.That(CheckAll(run, run.Changes), Is.GreaterThan(500));
    }

    /// <summary>The test would notice: one kind of flush left out at a time.</summary>
    [TestCase(false, "of the output folder")]
    [TestCase(true, "of the output folder")]
    [TestCase(false, "of checkpoints")]
    public void WithoutFlushesThereAreSuchOrders(bool overwrites, string which)
    {
        Recording run = Record(overwrites);
        bool ofOutput = which == "of the output folder";
        Assert.That(() => CheckAll(run, [.. run.Changes.Where(c =>
            c.Kind != DiskChangeKind.FolderFlushed || c.Path == _arguments.OutputDir != ofOutput)]),
            Throws.InstanceOf<BrokenStateException>());
    }

    private sealed record Recording(
        bool Overwrites, Dictionary<string, Node> Before, List<DiskChange> Changes);

    /// <summary>A file or folder, whatever its name; of the run that is recorded or an
    /// older.</summary>
    private sealed class Node(bool isFolder, bool isOld)
    {
        public bool IsFolder => isFolder;

        public bool IsOld => isOld;
    }

    /// <summary>A name in a folder that comes to mean a node, or none.</summary>
    private sealed record Entry(Node Folder, string Name, Node? Node);

    /// <summary>Entries that change together, and the change that they are.</summary>
    private sealed record Step(DiskChange Change, Node Flushed, params Entry[] Entries);

    private sealed class BrokenStateException(string what) : Exception(what);

    private Recording Record(bool overwrites)
    {
        _arguments = Runs.OneRow(_folder) with
        {
            MaxSteps = 3,
            SaveSteps = new Interval(1),
            SaveTotalLimit = 1,
        };
        // A longer run's: its numbers are above the new ones.
        if (overwrites)
            Runs.Train(_arguments with
            {
                MaxSteps = 8,
                SaveSteps = new Interval(4),
                SaveTotalLimit = null,
            });
        var before = new Dictionary<string, Node>
        {
            [_arguments.OutputDir] = new(isFolder: true, isOld: false),
        };
        if (overwrites)
            foreach (string path in Directory.GetFileSystemEntries(
                _arguments.OutputDir, "*", SearchOption.AllDirectories))
                before[path] = new Node(Directory.Exists(path), isOld: true);
        var changes = new List<DiskChange>();
        Disk.Watch.Value = changes.Add;
        try
        {
            Runs.Train(_arguments with { OverwriteOutputDir = overwrites });
        }
        finally
        {
            Disk.Watch.Value = null;
        }

        return new Recording(overwrites, before, changes);
    }

    // At every moment: all that is not sure kept, all lost, each alone lost, each alone kept, and
    // some drawn.
    private int CheckAll(Recording run, List<DiskChange> changes)
    {
        List<Step> steps = Steps(run.Before, changes);
        var random = new Random(11);
        var (seen, opened) = (new HashSet<string>(), new HashSet<string>());
        int saved = 0;
        for (int moment = 0; moment <= steps.Count; moment++)
        {
            int[] unsure = [.. Enumerable.Range(0, moment).Where(i => !steps.Skip(i + 1)
                .Take(moment - i - 1).Any(later => later.Change.Kind == DiskChangeKind.FolderFlushed
                    && later.Flushed == steps[i].Flushed))];
            List<HashSet<int>> losses = [[], [.. unsure]];
            foreach (int one in unsure)
            {
                losses.Add([one]);
                losses.Add([.. unsure.Where(i => i != one)]);
            }

            for (int draw = 0; draw < 8; draw++)
                losses.Add([.. unsure.Where(_ => random.Next(2) == 0)]);
            foreach (HashSet<int> lost in losses)
            {
                var names = Entries(run.Before);
                for (int i = 0; i < moment; i++)
                    if (!lost.Contains(i))
                        foreach (Entry entry in steps[i].Entries)
                            if (entry.Node is null) names.Remove((entry.Folder, entry.Name));
                            else names[(entry.Folder, entry.Name)] = entry.Node;
                Check(run, names, saved, seen, opened);
            }

            // As far as the run knows: the flush behind the rename has returned.
            if (moment < steps.Count && steps[moment].Change is
                { Kind: DiskChangeKind.FolderFlushed, Path: var flushed }
                && flushed == _arguments.OutputDir)
                saved = steps.Take(moment).Select(s => Number(s.Change.To)).DefaultIfEmpty().Max();
        }

        return seen.Count;
    }

    // Paths as they are at the time, so that what is done to a folder is done to it whatever its
    // name will be.
    private static List<Step> Steps(Dictionary<string, Node> before, List<DiskChange> changes)
    {
        var live = new Dictionary<string, Node>(before);
        var steps = new List<Step>();
        foreach (DiskChange change in changes)
        {
            var (kind, path, to) = change;
            string folder = Path.GetDirectoryName(path)!, name = Path.GetFileName(path);
            if (kind == DiskChangeKind.FolderFlushed)
            {
                if (live.TryGetValue(path, out Node? flushed)) steps.Add(new Step(change, flushed));
                continue;
            }

            if (!live.TryGetValue(folder, out Node? parent)) continue;
            if (kind is DiskChangeKind.FolderMade or DiskChangeKind.FileWritten)
            {
                live[path] = new Node(kind == DiskChangeKind.FolderMade, isOld: false);
                steps.Add(new Step(change, parent, new Entry(parent, name, live[path])));
            }
            else if (kind == DiskChangeKind.Removed)
            {
                live.Remove(path);
                steps.Add(new Step(change, parent, new Entry(parent, name, null)));
            }
            else
            {
                Assert.That(Path.GetDirectoryName(to), Is.EqualTo(folder));
                foreach (string below in live.Keys.Where(p => p == path
                    || p.StartsWith(path + "/", StringComparison.Ordinal)).ToList())
                {
                    live[to + below[path.Length..]] = live[below];
                    live.Remove(below);
                }

                steps.Add(new Step(change, parent, new Entry(parent, name, null),
                    new Entry(parent, Path.GetFileName(to)!, live[to!])));
            }
        }

        return steps;
    }

    private static Dictionary<(Node, string), Node> Entries(Dictionary<string, Node> paths) =>
        paths.Where(p => paths.ContainsKey(Path.GetDirectoryName(p.Key)!)).ToDictionary(
            p => (paths[Path.GetDirectoryName(p.Key)!], Path.GetFileName(p.Key)), p => p.Value);

    private void Check(
        Recording run, Dictionary<(Node Folder, string Name), Node> names, int saved,
        HashSet<string> seen, HashSet<string> opened)
    {
        Node root = run.Before[_arguments.OutputDir];
        var top = names.Where(e => e.Key.Folder == root)
            .OrderBy(e => e.Key.Name, StringComparer.Ordinal).ToList();
        string state = $"{saved}: " + string.Join(' ', top.Select(e => e.Key.Name
            + (e.Value.IsOld ? "(old)" : "")
            + (e.Value.IsFolder ? $"[{string.Join(' ', names.Where(f => f.Key.Folder == e.Value)
                .Select(f => f.Key.Name).Order())}]" : "")));
        if (!seen.Add(state)) return;
        foreach (var (key, node) in top)
            if (node.IsFolder && Number(key.Name) > 0)
                foreach (string name in s_parts)
                    if (!names.TryGetValue((node, name), out Node? part)
                        || part.IsOld != node.IsOld)
                        throw new BrokenStateException($"{key.Name} has no {name}: {state}");
        // From here on the names of the output folder decide.
        if (!opened.Add($"{saved}: " + string.Join(' ', top.Select(
            e => e.Key.Name + e.Value.IsOld)))) return;
        if (!run.Overwrites && saved == 0 && !top.Exists(e => Number(e.Key.Name) > 0)) return;
        string place = Path.Combine(_folder, "state");
        if (Directory.Exists(place)) Directory.Delete(place, recursive: true);
        Directory.CreateDirectory(place);
        foreach (var (key, node) in top)
        {
            string path = Path.Combine(place, key.Name);
            if (node.IsFolder)
                path = Path.Combine(Directory.CreateDirectory(path).FullName, "file");
            File.WriteAllText(path, node.IsOld ? "old" : "new");
        }

        using RunFolder folder = Open(place, state);
        int from = Number(folder.ResumeFrom);
        bool isOld = File.ReadAllText(Path.Combine(folder.ResumeFrom!, "file")) == "old";
        if (saved > 0 ? isOld || from < saved : isOld && from != 8)
            throw new BrokenStateException($"goes on from {folder.ResumeFrom}: {state}");
        if (Directory.GetDirectories(place, "*.tmp") is [var left, ..])
            throw new BrokenStateException($"{left} is left: {state}");
    }

    private RunFolder Open(string place, string state)
    {
        try
        {
            return RunFolder.Open(_arguments with
            {
                OutputDir = place,
                ResumeFromCheckpoint = new ResumePoint(null),
            });
        }
        catch (InputException refusal)
        {
            throw new BrokenStateException($"{refusal.Message}: {state}");
        }
    }

    private static int Number(string? path) => int.TryParse(
        Path.GetFileName(path)?.Replace("checkpoint-", ""), out int step) ? step : 0;
}
