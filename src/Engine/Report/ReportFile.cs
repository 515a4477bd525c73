namespace MiniCpmNative.Engine.Report;

/// <summary>Writes the reports of runs.</summary>
public static class ReportFile
{
    public const string FileName = "report.html";

    /// <summary>Writes the report of one run, or of several side by side.</summary>
    /// <param name="folders">Output folders of runs.</param>
    /// <param name="path">The page to write.</param>
    /// <exception cref="InputException">A folder is not that of a run.</exception>
    /// <exception cref="RunException">The page cannot be written.</exception>
    public static void Write(IReadOnlyList<string> folders, string path)
    {
        List<RunRecord> runs = [.. folders.Select(RunRecord.Read)];
        // Folders of one name are told apart by their number.
        foreach (var same in runs.GroupBy(r => r.Name).Where(g => g.Count() > 1).ToList())
            foreach (var (run, i) in same.Select((r, i) => (r, i))) run.Name += $" ({i + 1})";
        AtomicFile.WriteText(path, ReportPage.Of(runs));
    }
}
