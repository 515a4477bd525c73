using System.Reflection;
using System.Text.RegularExpressions;
using System.Xml.Linq;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Model;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The projects form one chain, and the folders of each no circle, so that each can be read without
/// the ones above it. docs/architecture.md has the picture.
/// </summary>
public sealed partial class ArchitectureTests
{
    private const string Engine = "MiniCpmNative.Engine";


    // The namespaces of Engine and those that each may use, which stand above it in this list. The
    // root is everybody's and uses none.
    private static readonly (string Part, string Below)[] s_engine =
    [
        ("", ""),
        ("Config", ""),
        ("Weights", "Config"),
        ("Data.Images", ""),
        ("Data.Audio", ""),
        ("Data.Text", ""),
        ("Report", "Data.Images"),
        ("Data", "Config Data.Audio Data.Images Data.Text"),
        ("Model", "Config Weights Data Data.Images Data.Text"),
        ("Metrics", ""),
        ("Generate", "Config Weights Data Data.Images Data.Text Model Metrics"),
        ("Train", "Config Weights Data Data.Text Model Metrics Generate Report"),
        ("Export", "Config Weights Data Data.Images Data.Text Model Generate Train"),
        ("Doctor", "Data.Images"),
    ];

    /// <summary>The repository's folder.</summary>
    internal static string Root { get; } = FindRoot();

    private static IEnumerable<string> EngineParts => s_engine.Select(p => p.Part);

    [TestCase("src/Kernels", "")]
    [TestCase("src/Autograd", "Kernels")]
    [TestCase("src/Engine", "Autograd")]
    [TestCase("src/Cli", "Engine")]
    public void A_project_refers_to_the_next_lower_one_only(string folder, string expected)
    {
        string name = Path.GetFileName(folder);
        var project = XDocument.Load(Path.Combine(Root, folder, name + ".csproj"));
        var references = project.Descendants("ProjectReference")
            .Select(e => Path.GetFileNameWithoutExtension(e.Attribute("Include")!.Value));
        Assert.That(string.Join(", ", references), Is.EqualTo(expected));
    }

    [TestCase("MiniCpmNative.Kernels", "MiniCpmNative.Autograd", "MiniCpmNative.Engine", "cpmx")]
    [TestCase("MiniCpmNative.Autograd", "MiniCpmNative.Engine", "cpmx")]
    [TestCase("MiniCpmNative.Engine", "cpmx")]
    public void An_assembly_does_not_use_those_above_it(string name, params string[] above)
    {
        var used = Assembly.Load(name).GetReferencedAssemblies().Select(a => a.Name);
        Assert.That(used, Has.None.AnyOf(above));
    }

    // Both devices are below operations, and neither knows the other. Only the declarations of what
    // runs on both, Op and Weight, name them; only the cases name everything.
    [TestCase("", "")]
    [TestCase("Op.cs", "Cpu Cuda")]
    [TestCase("Weight.cs", "Cpu Cuda")]
    [TestCase("Device.cs", "Updates")]
    [TestCase("Updates", "")]
    [TestCase("Cpu", "Updates")]
    [TestCase("Cuda", "Updates")]
    [TestCase("Quantised", "Cpu Cuda")]
    [TestCase("Ops", "Cpu Cuda")]
    [TestCase("Cases", "Cpu Cuda Ops")]
    public void A_part_of_Kernels_uses_those_below_it_only(string part, string below)
    {
        string[] parts = ["Cpu", "Cuda", "Quantised", "Ops", "Updates", "Cases"];
        string folder = Path.Combine(Root, "src/Kernels");
        IEnumerable<string> files = part.Length == 0
            ? Directory.EnumerateFiles(folder, "*.cs").Where(
                f => Path.GetFileName(f) is not ("Op.cs" or "Weight.cs" or "Device.cs"))
            : part.EndsWith(".cs", StringComparison.Ordinal)
                ? [Path.Combine(folder, part)]
                : Directory.EnumerateFiles(Path.Combine(folder, part), "*.cs");
        Assert.That(files, Is.Not.Empty);
        foreach (string file in files)
            foreach (string other in parts.Except([part, .. below.Split(' ')]))
                Assert.That(File.ReadAllText(file), Does.Not.Match(
                    $@"using (static )?MiniCpmNative\.Kernels\.{other}\b"
                    + $@"|\b{other}\.[A-Z]\w*[.(<]"), Path.GetRelativePath(Root, file));
    }

    [Test]
    public void The_tape_names_no_operation()
    {
        foreach (string file
            in Directory.EnumerateFiles(Path.Combine(Root, "src/Autograd"), "*.cs"))
            Assert.That(File.ReadAllText(file), Does.Not.Contain("Kernels.Ops"), file);
    }

    [Test]
    public void The_parts_of_Engine_form_no_circle()
    {
        var seen = new HashSet<string>();
        foreach (var (part, below) in s_engine)
        {
            Assert.That(Words(below), Is.SubsetOf(seen), part);
            seen.Add(part);
        }

        Assert.That(Sources("src/Engine").Select(PartOf).Distinct(), Is.EquivalentTo(EngineParts));
    }

    [Test]
    public void The_page_on_it_is_true()
    {
        string page = File.ReadAllText(Path.Combine(Root, "docs", "architecture.md"));
        foreach (var (part, below) in s_engine.Skip(1))
            Assert.That(page, Does.Match($@"(?m)^\| `{part}` \| .* \| ?{below} ?\|$"));
        string[] files = [.. Sources("src").Concat(Sources("tests"))];
        foreach (Match name in SourceName().Matches(page))
            Assert.That(files.Count(f => f.EndsWith("/" + name.Value, StringComparison.Ordinal)),
                name.Value.StartsWith("NAME", StringComparison.Ordinal)
                    || name.Value.EndsWith("/NAME.cs", StringComparison.Ordinal)
                    ? Is.Zero : Is.EqualTo(1), name.Value);
    }

    // A using, a name that the namespace around makes visible without one (Data's in Data.Text), or
    // one that is qualified from there (Train.Trainer).
    [TestCaseSource(nameof(EngineParts))]
    public void A_part_of_Engine_uses_those_below_it_only(string part)
    {
        string[] allowed = ["", part, .. Words(s_engine.Single(p => p.Part == part).Below)];
        string[] others = [.. EngineParts.Except(allowed)];
        foreach (string file in Sources("src/Engine").Where(f => PartOf(f) == part))
        {
            string code = Code(file), place = Path.GetRelativePath(Root, file);
            Assert.That(code, Does.Match($@"(?m)^namespace {NameOf(part)};"), place);
            foreach (string other in others)
            {
                string types = string.Join('|', typeof(InputException).Assembly.GetTypes()
                    .Where(t => t.Namespace == NameOf(other) && !t.IsNested
                        && !t.Name.Contains('<'))
                    .Select(t => t.Name.Split('`')[0]));
                string last = other[(other.LastIndexOf('.') + 1)..];
                Assert.That(code, Does.Not.Match(
                    $@"{Engine}\.{other}(;|\.({types})\b)|(?<![\w.]){last}\.({types})\b"),
                    place);
                if (part.StartsWith(other + ".", StringComparison.Ordinal))
                    Assert.That(code, Does.Not.Match(TypeUse(types)), place);
            }
        }
    }

    [TestCase("Label(Sample.Ignored)", true)]
    [TestCase("Sample? sample = null;", true)]
    [TestCase("Sample[] samples", true)]
    [TestCase("return new Sample(1);", true)]
    [TestCase("IReadOnlyList<Sample> list", true)]
    [TestCase("is Sample", true)]
    [TestCase("public int Sample(int x) => 1;", false)]
    [TestCase("const int Sample = 1;", false)]
    [TestCase("row.Sample.Length", false)]
    public void A_use_of_a_type_is_seen(string code, bool expected) =>
        Assert.That(Regex.IsMatch(code, TypeUse("Sample|Row")), Is.EqualTo(expected));

    // What is one family's own stands in its file.
    [Test]
    public void Nothing_outside_Families_knows_a_family()
    {
        string own = Path.Combine("Model", "Families") + Path.DirectorySeparatorChar;
        string types = string.Join('|', Families.All.Select(f => f.GetType().Name));
        string registry = Path.Combine("Model", "Family.cs");
        string[] files = [.. Sources("src").Where(f => !f.Contains(own, StringComparison.Ordinal))];
        Assert.That(
            files.Count(f => f.EndsWith(registry, StringComparison.Ordinal)), Is.EqualTo(1));
        foreach (string file in files)
        {
            string code = Code(file), place = Path.GetRelativePath(Root, file);
            Assert.That(code, Does.Not.Match("MiniCPM-(Llama3|[Vo]-)"), place);
            if (!file.EndsWith(registry, StringComparison.Ordinal))
                Assert.That(code, Does.Not.Match($@"\b({types})\b"), place);
        }
    }

    private static string TypeUse(string types) =>
        $@"(?<![\w.])(new ({types})\b|({types})(\.[A-Z]|[?\[\],]*\s+[a-z_])|is ({types})\b)"
        + $@"|[<(]({types})[>)?\[,]";

    private static string[] Words(string text) =>
        text.Split(' ', StringSplitOptions.RemoveEmptyEntries);

    private static string NameOf(string part) => part.Length == 0 ? Engine : $"{Engine}.{part}";

    // The folder, with dots; Families is a folder of Model's.
    private static string PartOf(string file)
    {
        string folder = Path.GetRelativePath(
            Path.Combine(Root, "src/Engine"), Path.GetDirectoryName(file)!);
        return folder == "." ? ""
            : folder.Replace(Path.DirectorySeparatorChar, '.').Replace(".Families", "");
    }

    private static string[] Sources(string folder) =>
        [.. Directory.EnumerateFiles(
            Path.Combine(Root, folder), "*.cs", SearchOption.AllDirectories)
            .Where(f => !Path.GetRelativePath(Root, f).Split(Path.DirectorySeparatorChar)
                .Any(name => name is "obj" or "bin"))];

    // Without comments.
    private static string Code(string file) => Comment().Replace(File.ReadAllText(file), "");

    [GeneratedRegex(@"(?<!:)//.*")]
    private static partial Regex Comment();

    [GeneratedRegex(@"[\w./]+\.cs\b")]
    private static partial Regex SourceName();

    private static string FindRoot()
    {
        string? folder = TestContext.CurrentContext.TestDirectory;
        while (folder is not null && !File.Exists(Path.Combine(folder, "MiniCpmNative.sln")))
            folder = Path.GetDirectoryName(folder);
        return folder
            ?? throw new InvalidOperationException("the tests run outside the repository");
    }
}
