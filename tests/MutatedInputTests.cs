using System.Diagnostics;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Damaged files of every kind that a run reads: each is taken, or refused with one line that a
/// terminal shows as it is, soon. CPMX_MUTATIONS says how many of a kind; the number of a mutation
/// stands in a failure and makes it again.
/// </summary>
[TestFixture]
public sealed class MutatedInputTests
{
    private static readonly TimeSpan s_soon = TimeSpan.FromSeconds(20);

    private static readonly int s_count = int.TryParse(
        Environment.GetEnvironmentVariable("CPMX_MUTATIONS"), out int asked) ? asked : 60;

    private string _folder = "";

    [OneTimeSetUp]
    public void MakeFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [OneTimeTearDown]
    public void RemoveFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("formats/data/*.json", true)]
    [TestCase("formats/data/*.jsonl", false)]
    [TestCase("formats/data/*.csv", false)]
    [TestCase("formats/data/*.parquet", false)]
    [TestCase("formats/data/odd/*.json*", false)]
    [TestCase("formats/data/odd/*.csv", false)]
    public void Rows(string files, bool json) =>
        Try(files, json, Path.GetExtension(files), file => RowFile.Read(file));

    // A footer whose numbers, lists and structures have no end.
    [TestCase(0x15, 0xFF)]
    [TestCase(0x19, 0xF1)]
    [TestCase(0x1C, 0x1C)]
    [CancelAfter(20_000)]
    public void FootersWithoutEndAreRefused(int first, int then)
    {
        byte[] file = File.ReadAllBytes(
            Path.Combine(ReferenceFile.Root, "formats", "data", "messages.parquet"));
        int footer = BitConverter.ToInt32(file, file.Length - 8);
        Assert.That(ParquetStructure.IsSound(file), Is.True);
        file.AsSpan(file.Length - 8 - footer, footer).Fill((byte)then);
        file[file.Length - 8 - footer] = (byte)first;
        Assert.That(() => RowFile.Parse("rows.parquet", file),
            Throws.TypeOf<InputException>().With.Message.Contains("damaged"));
    }

    // Numbers, types and lengths among them; the largest file takes what its columns hold.
    [TestCase(0x00)]
    [TestCase(0x7F)]
    [TestCase(0xFF)]
    [CancelAfter(20_000)]
    public void AnyByteOfAParquetFileMayBeWrong(int wrong)
    {
        byte[] good = File.ReadAllBytes(
            Path.Combine(ReferenceFile.Root, "formats", "data", "messages.parquet"));
        for (int i = 0; i < good.Length; i++)
        {
            byte[] file = [.. good];
            file[i] = (byte)wrong;
            long before = GC.GetAllocatedBytesForCurrentThread();
            try
            {
                RowFile.Parse("rows.parquet", file);
            }
            catch (InputException)
            {
            }

            Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.LessThan(1 << 26),
                $"{i}");
        }
    }

    [Test]
    public void DataSetsOfLlamaFactory()
    {
        string info = Path.Combine(_folder, DatasetInfo.FileName);
        Try([File.ReadAllBytes(Path.Combine(ReferenceFile.Root, "formats", DatasetInfo.FileName))],
            true, DatasetInfo.FileName, _ =>
            {
                foreach (string name in (string[])["messages", "alpaca", "sharegpt"])
                    DatasetInfo.Entry(info, name);
                DatasetInfo.Of(Path.Combine(_folder, "alpaca.json"));
            });
        File.Delete(info);
    }

    [TestCase("data:image/png;base64,")]
    [TestCase("")]
    public void PicturesInRows(string head)
    {
        string picture = Convert.ToBase64String(File.ReadAllBytes(Path.Combine(
            ReferenceFile.Root, "..", "..", "examples", "pictures", "test", "0000.png")));
        byte[] row =
            System.Text.Encoding.UTF8.GetBytes(System.Text.Json.JsonSerializer.Serialize(new
            {
                query = "<image>What?",
                response = "That.",
                images = new[] { head + picture },
            }));
        Try([row], false, "embedded.jsonl", file =>
        {
            foreach (Row read in RowFile.Read(file).Rows)
                foreach (RowPicture named in read.Pictures)
                    if (named.Bytes is { } bytes)
                        PictureDecoder.Decode(bytes, named.Path).Dispose();
        });
    }

    [TestCase(".json")]
    [TestCase(".yaml")]
    public void Configurations(string ending)
    {
        byte[] good = TrainWriter.ToJson(new TrainArguments
        {
            ModelNameOrPath = "m",
            DataPath = "d",
            LoraTargetModules = new TargetModules(["q_proj"]),
        });
        // JSON is YAML, and so is this.
        if (ending == ".yaml")
            good = "model_name_or_path: m\ndata_path: [d, 'e']\nlora_r: 8\nbf16: yes\n"u8.ToArray();
        Try([good], ending == ".json", "config" + ending,
            file => TrainReader.Read([file], _folder));
    }

    [Test]
    public void AdapterConfigurations() => Try("adapters/**/adapter_config.json", true,
        "adapter_config.json", file => AdapterConfig.Read(file));

    [Test]
    public void Tensors() =>
        Try("adapters/**/adapter_model.safetensors", false, "t.safetensors", file =>
    {
        using var tensors = SafetensorsFile.Open(file);
        foreach (StoredTensor tensor in tensors.Tensors)
            if (tensor.Bytes < 1 << 20) _ = tensor.Span.Length;
    });

    [TestCase("run_state.json")]
    [TestCase("trainer_state.json")]
    public void Checkpoints(string name)
    {
        var arguments = V26.Lora with
        {
            DataPath = Runs.Data(_folder, "one"),
            OutputDir = Path.Combine(_folder, "run"),
            OverwriteOutputDir = true,
            MaxSteps = 1,
        };
        Runs.Train(arguments);
        string checkpoint = RunFolder.Checkpoint(arguments.OutputDir, 1);
        byte[] good = File.ReadAllBytes(Path.Combine(checkpoint, name));
        Try([good], true, Path.Combine(checkpoint, name), _ => RunState.Read(checkpoint));
    }

    [Test]
    public void Tokenizers()
    {
        byte[] good = ReferenceText.Bytes("v26/model/tokenizer.json");
        Try([good], true, "tokenizer.json", file => Tokenizer.Parse(File.ReadAllBytes(file), null)
            .Encode("<image>Das ist ein Test, 123  \n "));
    }

    [TestCase("png")]
    [TestCase("jpg")]
    [TestCase("webp")]
    [TestCase("gif")]
    [TestCase("bmp")]
    [TestCase("tga")]
    public void Pictures(string kind) => Try($"images/**/*.{kind}", false, "picture." + kind,
        file => PictureDecoder.Decode(file).Dispose());

    private void Try(string files, bool json, string name, Action<string> read)
    {
        string root = ReferenceFile.Root;
        bool deep = files.Contains("**", StringComparison.Ordinal);
        string folder = Path.Combine(root, Path.GetDirectoryName(files.Replace("/**", ""))!);
        byte[][] good = [.. Directory.GetFiles(folder, Path.GetFileName(files),
                deep ? SearchOption.AllDirectories : SearchOption.TopDirectoryOnly)
            .Where(f => new FileInfo(f).Length < 100_000).Order(StringComparer.Ordinal)
            .Select(File.ReadAllBytes)];
        Assert.That(good, Is.Not.Empty);
        Try(good, json, name.StartsWith('.') ? "rows" + name : name, read);
    }

    private void Try(byte[][] good, bool json, string name, Action<string> read)
    {
        string file = Path.Combine(_folder, name);
        int taken = 0, refused = 0;
        for (int i = 0; i < s_count; i++)
        {
            byte[] whole = good[i % good.Length];
            var mutations = new Mutations(i);
            File.WriteAllBytes(file, json && i % 2 == 0 && IsTree(whole)
                ? System.Text.Encoding.UTF8.GetBytes(
                    mutations.Json(System.Text.Encoding.UTF8.GetString(whole)))
                : mutations.Bytes(whole));
            var watch = Stopwatch.StartNew();
            try
            {
                read(file);
                taken++;
            }
            catch (Exception refusal) when (refusal is InputException)
            {
                refused++;
                Assert.That(refusal.Message.Any(char.IsControl), Is.False,
                    $"mutation {i}: {refusal.Message}");
            }
            catch (Exception failure) when (failure is not AssertionException)
            {
                Assert.Fail($"{name}, mutation {i}: {failure}");
            }

            Assert.That(watch.Elapsed, Is.LessThan(s_soon), $"{name}, mutation {i}");
        }

        TestContext.Out.WriteLine($"{name}: {s_count} mutations, {taken} taken, {refused} refused");
    }

    private static bool IsTree(byte[] bytes)
    {
        try
        {
            return System.Text.Json.Nodes.JsonNode.Parse(bytes) is not null;
        }
        catch (System.Text.Json.JsonException)
        {
            return false;
        }
    }
}
