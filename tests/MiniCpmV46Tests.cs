using System.Text.Json;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>What is MiniCPM-V 4.6's own: configuration, pictures, placeholders, prompts.</summary>
[TestFixture]
public sealed class MiniCpmV46Tests
{
    private static readonly ModelSpec s_spec = ModelSpec.Read(V46.Model);
    private static readonly RowFormat s_format = s_spec.Rows();
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void EveryParameterIsKnownByNameAndShape()
    {
        Assert.That(s_spec.Parameters.All.Select(p => $"{p.Name} {p.Shape}"),
            Is.EquivalentTo(V46.Json("parameters.json").EnumerateObject().Select(p =>
                $"{p.Name} [{string.Join(", ", ReferenceText.Ints(p.Value))}]")));
        Assert.That(s_spec.Parameters.All.Where(p => !p.Decays).Select(p => p.Name),
            Is.EquivalentTo(V46.Json("full_steps.json").GetProperty("without_weight_decay")
                .EnumerateArray().Select(n => n.GetString())));
    }

    [Test]
    public void ThePublishedModelHasItsNumberOfParameters()
    {
        ModelSpec spec = V46.Changed(_folder, (config, _) =>
        {
            config["insert_layer_id"] = 6;
            var vision = config["vision_config"]!;
            (vision["hidden_size"], vision["intermediate_size"]) = (1152, 4304);
            (vision["num_hidden_layers"], vision["num_attention_heads"]) = (27, 16);
            vision["image_size"] = 980;
            var text = config["text_config"]!;
            (text["vocab_size"], text["hidden_size"]) = (248094, 1024);
            (text["intermediate_size"], text["num_hidden_layers"]) = (3584, 24);
            (text["num_attention_heads"], text["num_key_value_heads"]) = (8, 2);
            (text["linear_num_key_heads"], text["linear_num_value_heads"]) = (16, 16);
            (text["linear_key_head_dim"], text["linear_value_head_dim"]) = (128, 128);
            text["head_dim"] = 256;
            text.AsObject().Remove("layer_types");
        });
        Assert.That(spec.Parameters.Count, Is.EqualTo(1_300_428_016));
        Assert.That(Of("model.vision_tower."), Is.EqualTo(522_299_312));
        Assert.That(Of("model.vision_tower.vit_merger."), Is.EqualTo(104_507_072));
        Assert.That(Of("model.merger."), Is.EqualTo(25_967_104));
        Assert.That(Of("model.language_model.layers.3.self_attn."), Is.Positive);
        Assert.That(Of("model.language_model.layers.4.linear_attn."), Is.Positive);

        long Of(string prefix) => spec.Parameters.All
            .Where(p => p.Name.StartsWith(prefix, StringComparison.Ordinal))
            .Sum(p => p.Shape.Count);
    }

    [TestCase("16x", false)]
    [TestCase("4x", true)]
    public void TheMergerOfTheTowerIsTrainedWhereItRuns(string mode, bool isFixed)
    {
        ModelSpec spec = V46.Changed(_folder, (config, processor) =>
        {
            config["downsample_mode"] = mode;
            processor["downsample_mode"] = mode;
        });
        Assert.That(spec.Parameters.All.Where(p => p.Name.Contains(".vit_merger."))
            .Select(p => p.Fixed), Is.All.EqualTo(isFixed));
        Assert.That(spec.Slicing.Multiple, Is.EqualTo(mode == "16x" ? 56 : 28));
    }

    [Test]
    public void PicturesAreCutAsTheProcessorCutsThem()
    {
        foreach (JsonElement row in V46.Json("sizes.json").GetProperty("rows").EnumerateArray())
        {
            int multiple = row[2].GetString() == "16x" ? 56 : 28;
            SlicePlan plan = Slicer.Plan(
                new(row[0].GetInt32(), row[1].GetInt32()), row[4].GetInt32(), row[3].GetInt32(),
                multiple);
            Assert.That(new[] { plan.Overview.Height, plan.Overview.Width },
                Is.EqualTo(ReferenceText.Ints(row[5])), row.ToString());
            if (row[6].ValueKind == JsonValueKind.Null)
            {
                Assert.That(plan.Sliced, Is.False, row.ToString());
                continue;
            }

            Assert.That((int[])[plan.Rows, plan.Columns], Is.EqualTo(ReferenceText.Ints(row[6])),
                row.ToString());
            Assert.That((int[])[plan.Tile.Height, plan.Tile.Width],
                Is.EqualTo(ReferenceText.Ints(row[7])), row.ToString());
        }
    }

    [Test]
    public void TheTemplateAndItsTokensAreEqual()
    {
        foreach (JsonElement chat in V46.Json("chat.json").GetProperty("template").EnumerateArray())
        {
            ChatTurn[] turns = [.. chat.GetProperty("messages").EnumerateArray().Select(Turn)];
            bool? thinks = chat.GetProperty("enable_thinking").ValueKind == JsonValueKind.Null
                ? null : chat.GetProperty("enable_thinking").GetBoolean();
            var prompts = (ThinkingFormat)s_format.Prompts;
            bool asks = chat.GetProperty("add_generation_prompt").GetBoolean();
            string expected = chat.GetProperty("text").GetString()!;
            int[] ids = ReferenceText.Ints(chat.GetProperty("input_ids"));
            Assert.That(asks ? prompts.Prompt(turns, thinks) : prompts.Render(turns),
                Is.EqualTo(expected));
            Assert.That(s_format.Tokenizer.Encode(expected), Is.EqualTo(ids));
            Assert.That(asks ? prompts.EncodePrompt(turns, thinks) : prompts.Encode(turns).Ids,
                Is.EqualTo(ids));
        }

        // Parts are joined by line ends.
        static ChatTurn Turn(JsonElement message)
        {
            JsonElement content = message.GetProperty("content");
            return new ChatTurn(message.GetProperty("role").GetString()!,
                content.ValueKind == JsonValueKind.String ? content.GetString()!
                : string.Join('\n', content.EnumerateArray().Select(part =>
                    part.GetProperty("type").GetString() == "image"
                        ? "<|image_pad|>" : part.GetProperty("text").GetString())));
        }
    }

    [Test]
    public void PlacesOfPicturesAreTheProcessors()
    {
        JsonElement calls = V46.Json("chat.json").GetProperty("processor");
        foreach (JsonElement call in calls.EnumerateArray())
        {
            JsonElement options = call.GetProperty("options");
            ModelSpec spec = V46.Changed(_folder, (config, processor) =>
            {
                foreach (JsonProperty option in options.EnumerateObject())
                    processor[option.Name] = System.Text.Json.Nodes.JsonNode.Parse(
                        option.Value.GetRawText());
                config["downsample_mode"] = processor["downsample_mode"]!.DeepClone();
            });
            RowFormat format = spec.Rows();
            SlicePlan[] plans = [.. call.GetProperty("image_sizes").EnumerateArray()
                .Select(s => V46.Plan(format, new(s[0].GetInt32(), s[1].GetInt32())))];
            int picture = 0, text = 0;
            foreach (JsonElement given in call.GetProperty("texts").EnumerateArray())
            {
                string[] parts = given.GetString()!.Split("<|image_pad|>");
                string filled = parts[0];
                for (int k = 1; k < parts.Length; k++)
                    filled += format.Placeholders.Text(
                        plans[picture++], format.Numbered ? k - 1 : null) + parts[k];
                // Shorter texts are padded on the left.
                string expected = call.GetProperty("expanded")[text].GetString()!;
                int padding = ReferenceText.Ints(call.GetProperty("attention_mask")[text])
                    .Count(m => m == 0);
                Assert.That(filled, Is.EqualTo(expected[(padding * "<|endoftext|>".Length)..]));
                int[] ids = ReferenceText.Ints(call.GetProperty("input_ids")[text])[padding..];
                Assert.That(format.Tokenizer.Encode(filled), Is.EqualTo(ids));
                text++;
            }
        }
    }

    [Test]
    public void ARowBecomesTheReferencesTokensAndPatches()
    {
        string path = Path.Combine(_folder, "rows.json");
        using (Picture picture = V46.Picture(0))
            V46.SaveBmp(picture, Path.Combine(_folder, "a.bmp"));
        File.WriteAllText(path, """
            [{"image": "a.bmp", "conversations": [
              {"role": "user", "content": "<image>\nWhat is in the picture? "},
              {"role": "assistant", "content": " A red circle and a blue square."}]}]
            """);
        var rows = DataRows.Read(path, V46.Full with { DataPath = path }, s_format);
        var batch = new Batch();
        batch.Clear();
        rows.Append(0, batch);
        Batch expected = V46.Batch(s_format, 0);
        // Rows have no system prompt; the reference's first text has one.
        int system = s_format.Tokenizer.Encode(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n").Length;
        Assert.That(batch.Tokens.Span.ToArray(),
            Is.EqualTo(expected.Tokens.Span.ToArray()[system..]));
        Assert.That(batch.Grids.Span.ToArray(), Is.EqualTo(expected.Grids.Span.ToArray()));
        Assert.That(batch.Slots.Span.ToArray().Select(slot => slot + system),
            Is.EqualTo(expected.Slots.Span.ToArray()));
        Assert.That(batch.Patches.Span.SequenceEqual(expected.Patches.Span), Is.True);
        // The empty think block is the template's: the reference learns it, rows do not.
        int thought = s_format.Tokenizer.Encode("<think>\n\n</think>\n\n").Length;
        Assert.That(batch.Targets.Span.ToArray(),
            Is.EqualTo(expected.Targets.Span.ToArray()[thought..]));
    }

    [Test]
    public void PatchesAndGridsAreTheProcessors()
    {
        Batch batch = V46.Batch(s_format);
        Assert.That(batch.Grids.Span.ToArray().Select(v => (double)v),
            Is.EqualTo(V46.Inputs.Doubles("target_sizes")));
        var wanted = Fingerprint.Read(
            V46.Expected.GetProperty("activations").GetProperty("pixel_values"));
        Assert.That(Fingerprint.Of(batch.Patches.Span, wanted.Shape)
            .ElementError(wanted, 1), Is.LessThan(1e-6));
        Assert.That(batch.Features, Is.EqualTo(44));
    }

    [TestCase("text_config.attention_bias", "true", "expected false")]
    [TestCase("text_config.linear_conv_kernel_dim", "3", "expected 4")]
    [TestCase("text_config.linear_num_value_heads", "3", "a multiple of linear_num_key_heads (2)")]
    [TestCase("text_config.layer_types", "[\"full_attention\"]", "one for each of the 4 layers")]
    [TestCase("text_config.rope_parameters.rope_type", "\"yarn\"", "expected \"default\"")]
    [TestCase("merger_times", "2", "expected 1")]
    [TestCase("downsample_mode", "\"4x\"", "another downsample_mode than config.json")]
    [TestCase("downsample_mode", "\"8x\"", "expected \"16x\" or \"4x\"")]
    [TestCase("insert_layer_id", "4", "expected a whole number from 0 to 3")]
    public void AConfigurationThatIsNotSupportedIsRefused(string key, string value, string message)
    {
        var failure = Assert.Throws<InputException>(() => V46.Changed(_folder, (config, _) =>
        {
            string[] path = key.Split('.');
            System.Text.Json.Nodes.JsonNode at = config;
            foreach (string name in path[..^1]) at = at[name]!;
            at[path[^1]] = System.Text.Json.Nodes.JsonNode.Parse(value);
        }));
        Assert.That(failure!.Message, Does.Contain(message));
    }

    [Test]
    public void TheOfficialScriptDoesNotKnowIt() => Assert.That(
        () => s_format.RequireLlmType(null, officialCompat: true),
        Throws.TypeOf<InputException>().With.Message.Contains("official_compat"));
}
