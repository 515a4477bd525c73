using System.Reflection;
using System.Xml.Linq;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The projects form one chain, so that each can be read without the ones above it.
/// </summary>
public sealed class ArchitectureTests
{
    private static readonly string s_root = FindRoot();

    [TestCase("src/Kernels", "")]
    [TestCase("src/Autograd", "Kernels")]
    [TestCase("src/Engine", "Autograd")]
    [TestCase("src/Cli", "Engine")]
    public void A_project_refers_to_the_next_lower_one_only(string folder, string expected)
    {
        string name = Path.GetFileName(folder);
        var project = XDocument.Load(Path.Combine(s_root, folder, name + ".csproj"));
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
    [TestCase("Ops", "Cpu Cuda")]
    [TestCase("Cases", "Cpu Cuda Ops")]
    public void A_part_of_Kernels_uses_those_below_it_only(string part, string below)
    {
        string[] parts = ["Cpu", "Cuda", "Ops", "Updates", "Cases"];
        string folder = Path.Combine(s_root, "src/Kernels");
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
                    + $@"|\b{other}\.[A-Z]\w*[.(<]"), Path.GetRelativePath(s_root, file));
    }

    [Test]
    public void The_tape_names_no_operation()
    {
        foreach (string file
            in Directory.EnumerateFiles(Path.Combine(s_root, "src/Autograd"), "*.cs"))
            Assert.That(File.ReadAllText(file), Does.Not.Contain("Kernels.Ops"), file);
    }

    private static string FindRoot()
    {
        string? folder = TestContext.CurrentContext.TestDirectory;
        while (folder is not null && !File.Exists(Path.Combine(folder, "MiniCpmNative.sln")))
            folder = Path.GetDirectoryName(folder);
        return folder
            ?? throw new InvalidOperationException("the tests run outside the repository");
    }
}
